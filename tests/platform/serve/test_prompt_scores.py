"""Log probabilities of prompts: those of one forward pass, in whatever chunks they came."""

from typing import Any

import pytest
import torch

from nsa_platform.config.serve import EngineConfig
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.serve.engine import Engine
from nsa_platform.serve.request import Output, SamplingParams

PROMPTS = {"a": [1 + (7 * n) % 250 for n in range(45)], "b": [9, 8, 7], "c": [5]}
SETTINGS: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(make_speaker):
    return make_speaker()


@torch.no_grad()
def recomputed(model, prompt: list[int]) -> torch.Tensor:
    """[T - 1, vocab]: of every token but the first."""
    hidden = model(torch.tensor(prompt), PackedInputs.from_lengths([len(prompt)])).hidden
    return model.logits(hidden).log_softmax(-1)[:-1]


def first_outputs(engine: Engine) -> dict[str, Output]:
    first: dict[str, Output] = {}
    later = []
    while engine.has_work:
        for output in engine.step():
            if first.setdefault(output.request_id, output) is not output:
                later.append(output)
        engine.check()
    assert all(output.prompt_logprobs is None for output in later)
    return first


@pytest.mark.parametrize("step_tokens", [7, 512])
def test_they_are_those_of_one_pass(model, toy_tokenizer, step_tokens):
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=step_tokens)
    engine = Engine(model, toy_tokenizer, config)
    for name, prompt in PROMPTS.items():
        engine.add(name, prompt, SamplingParams(prompt_logprobs=3, **SETTINGS))
    engine.add("plain", PROMPTS["a"], SamplingParams(**SETTINGS))
    found = first_outputs(engine)
    assert found["plain"].prompt_logprobs is None
    for name, prompt in PROMPTS.items():
        wanted, entries = recomputed(model, prompt), found[name].prompt_logprobs
        assert entries is not None and [entry.token_id for entry in entries] == prompt[1:]
        for row, entry in enumerate(entries):
            logs = wanted[row]
            assert entry.logprob == pytest.approx(float(logs[entry.token_id]), abs=1e-4)
            assert entry.rank == 1 + int((logs > logs[entry.token_id]).sum())
            values, ids = logs.topk(3)
            assert [token for token, _ in entry.top] == ids.tolist()
            assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_they_are_whole_the_second_time_and_after_a_preemption(model, toy_tokenizer):
    config = EngineConfig(max_num_seqs=3, max_num_batched_tokens=24, num_kv_tokens=64)
    engine = Engine(model, toy_tokenizer, config)
    prompt = PROMPTS["a"][:25]
    settings: dict[str, Any] = {**SETTINGS, "max_tokens": 40}
    params = SamplingParams(prompt_logprobs=0, **settings)
    for name in ("first", "second", "third"):
        engine.add(name, prompt, params)
    found = first_outputs(engine)
    assert engine.stats().preemptions_total > 0
    lines = [[e.logprob for e in output.prompt_logprobs or ()] for output in found.values()]
    assert [len(line) for line in lines] == [len(prompt) - 1] * 3
    assert lines[1] == pytest.approx(lines[0], abs=1e-4)
    assert lines[2] == pytest.approx(lines[0], abs=1e-4)


def test_an_aborted_request_leaves_nothing_behind(model, toy_tokenizer):
    engine = Engine(model, toy_tokenizer, EngineConfig(max_num_seqs=2, max_num_batched_tokens=8))
    engine.add("a", PROMPTS["a"], SamplingParams(prompt_logprobs=1, **SETTINGS))
    engine.step()
    assert engine.runner.prompt_scores.known_ids == {"a"}
    engine.abort("a")
    engine.check()
    assert not engine.runner.prompt_scores.known_ids
