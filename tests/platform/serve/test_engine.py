"""The engine: greedy text equals recomputing from scratch, whoever else is there."""

import random
from typing import Any

import pytest
import torch

from nsa_platform.config.serve import EngineConfig
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.serve.admission import QueueFull
from nsa_platform.serve.batch_sampler import Choices
from nsa_platform.serve.engine import Engine
from nsa_platform.serve.generator import Generator
from nsa_platform.serve.kv_cache import page_size_of
from nsa_platform.serve.request import Output, SamplingParams
from nsa_platform.serve.selection_sample import SelectionSampler

ATTENTION = {"nsa": {}, "full": {"kind": "full"}}
GREEDY = {"temperature": 0.0, "ignore_eos": True}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, 260, (length,), generator=generator).tolist()


def run(engine: Engine) -> dict[str, list[Output]]:
    """Step until nothing is left, with a look at the pages after every step."""
    outputs: dict[str, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.check()
    assert engine.stats().pages_used == engine.stats().window_pages_used == 0
    return outputs


def ids_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@torch.no_grad()
def recomputed(model, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        hidden = model(torch.tensor(ids), PackedInputs.from_lengths([len(ids)])).hidden
        ids.append(int(model.logits(hidden[-1]).argmax()))
    return ids[len(prompt) :]


@pytest.fixture(params=list(ATTENTION.values()), ids=list(ATTENTION))
def model(request, make_speaker):
    return make_speaker(request.param)


@pytest.fixture
def make_engine(toy_tokenizer):
    def make(model, **sizes) -> Engine:
        # As on a GPU; the other files' engines take their steps one after the other.
        sizes = {"async_scheduling": True, **sizes}
        sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 16, **sizes}
        return Engine(model, toy_tokenizer, EngineConfig(**sizes))

    return make


LENGTHS = [1, 7, 8, 33, 48, 12, 90]


@pytest.mark.parametrize(
    "sizes",
    [
        {"max_num_seqs": 1, "max_num_batched_tokens": 5},
        {"max_num_seqs": 3, "max_num_batched_tokens": 3},
        {"max_num_seqs": 4, "max_num_batched_tokens": 13},
        {"max_num_seqs": 8, "max_num_batched_tokens": 512},
        {"async_scheduling": False},
    ],
    ids=["alone", "token-by-token", "chunks", "whole", "in-turn"],
)
def test_greedy_equals_recomputing_from_scratch(model, make_engine, sizes):
    engine = make_engine(model, **sizes)
    for length in LENGTHS:
        engine.add(str(length), prompt_of(length), SamplingParams(max_tokens=14, **GREEDY))
    outputs = run(engine)
    assert len({token for length in LENGTHS for token in ids_of(outputs[str(length)])}) > 20
    for length in LENGTHS:
        wanted = recomputed(model, prompt_of(length), 14)
        assert ids_of(outputs[str(length)]) == wanted
        assert list(Generator(model).stream(prompt_of(length), 14)) == wanted


# Pages of 8 tokens, and of 64: the younger ones grow into a new page first.
CROWDED = {"nsa": [30, 25, 41, 9, 33, 28], "full": [44, 62, 63, 50, 61, 60]}


def test_greedy_survives_preemption(model, make_engine):
    engine = make_engine(model, max_num_batched_tokens=24, num_kv_tokens=72)
    prompts = {str(n): prompt_of(n) for n in CROWDED[model.config.attention.kind]}
    for name, prompt in prompts.items():
        engine.add(name, prompt, SamplingParams(max_tokens=40, **GREEDY))
    outputs = run(engine)
    stats, num_prompt = engine.stats(), sum(map(len, prompts.values()))
    assert stats.preemptions_total > 0
    assert stats.computed_tokens_total > num_prompt + 6 * 39
    assert stats.generation_tokens_total == 6 * 40
    assert stats.prompt_tokens_total == num_prompt
    for name, prompt in prompts.items():
        assert ids_of(outputs[name]) == list(Generator(model).stream(prompt, 40))
        assert [o.num_output_tokens for o in outputs[name]] == list(range(1, 41))


def test_pages_may_be_several_blocks(model, make_engine):
    engine = make_engine(
        model, block_size=2 * page_size_of(model.config), max_num_batched_tokens=21
    )
    for length in (60, 13, 70):
        engine.add(str(length), prompt_of(length), SamplingParams(max_tokens=9, **GREEDY))
    outputs = run(engine)
    for length in (60, 13, 70):
        wanted = list(Generator(model).stream(prompt_of(length), 9))
        assert ids_of(outputs[str(length)]) == wanted


def test_random_comings_and_goings(model, make_engine):
    chance = random.Random(5)
    engine = make_engine(model, max_num_seqs=3, max_num_batched_tokens=11, num_kv_tokens=70)
    asked: dict[str, tuple[list[int], int]] = {}
    outputs: dict[str, list[Output]] = {}
    while engine.has_work or len(asked) < 12:
        if chance.random() < 0.3 and len(asked) < 12:
            name, prompt = f"request-{len(asked)}", prompt_of(chance.randint(1, 45), len(asked))
            asked[name] = (prompt, chance.randint(1, 25))
            outputs[name] = []
            engine.add(name, prompt, SamplingParams(max_tokens=asked[name][1], **GREEDY))
        if asked and chance.random() < 0.04:
            aborted = engine.abort(chance.choice(list(asked)))
            assert aborted is None or aborted.finish_reason == "abort"
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.check()
    assert engine.stats().pages_used == 0
    for name, (prompt, count) in asked.items():
        ids = ids_of(outputs[name])
        assert ids == list(Generator(model).stream(prompt, count))[: len(ids)]
        assert len(ids) == count or outputs[name][-1:] == [] or not outputs[name][-1].finish_reason
    ends = [outputs[name][-1].finish_reason for name in asked if outputs[name]]
    assert ends.count("length") >= 7


SAMPLED = {"temperature": 1.5, "ignore_eos": True, "max_tokens": 24}
SETTINGS = [
    {"seed": 3},
    {"seed": 3, "top_p": 0.8, "top_k": 40},
    {"seed": 4, "min_p": 0.05, "logprobs": 2},
    {"seed": 5, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
    {"seed": 6, "logit_bias": {5: 3.0, 7: -100.0}, "min_tokens": 10, "ignore_eos": False},
    {},
]


def test_sampled_text_does_not_depend_on_the_batch(model, make_engine):
    alone = []
    for number, settings in enumerate(SETTINGS):
        engine = make_engine(model, max_num_seqs=1, max_num_batched_tokens=200)
        params = SamplingParams(**{**SAMPLED, **settings})
        engine.add(f"request-{number}", prompt_of(20 + number), params)
        alone.append(ids_of(run(engine)[f"request-{number}"]))
    crowd = make_engine(model, max_num_seqs=5, max_num_batched_tokens=9, num_kv_tokens=100)
    for number, settings in enumerate(SETTINGS):
        crowd.add(f"stranger-{number}", prompt_of(31, number), SamplingParams(**SAMPLED, seed=3))
        params = SamplingParams(**{**SAMPLED, **settings})
        crowd.add(f"request-{number}", prompt_of(20 + number), params)
    outputs = run(crowd)
    together = [ids_of(outputs[f"request-{number}"]) for number in range(len(SETTINGS))]
    assert together == alone
    assert len({tuple(ids) for ids in together}) == len(SETTINGS)


def test_a_request_without_a_seed_is_seeded_by_engine_and_id(make_speaker, make_engine):
    def sampled(seed: int, request_id: str) -> list[int]:
        engine = make_engine(make_speaker(), seed=seed)
        engine.add(request_id, prompt_of(9), SamplingParams(**SAMPLED))
        return ids_of(run(engine)[request_id])

    assert sampled(0, "a") == sampled(0, "a")
    assert len({tuple(sampled(*key)) for key in ((0, "a"), (1, "a"), (0, "b"))}) == 3


def test_the_next_step_is_under_way_before_the_last_one_is_taken(
    make_speaker, make_engine, monkeypatch
):
    model, events = make_speaker(), []
    engine = make_engine(model, max_num_batched_tokens=64)
    run_step, collect = engine.runner.run, Choices.collect

    def noted_run(*args):
        events.append("run")
        return run_step(*args)

    def noted_collect(choices):
        events.append("collect")
        return collect(choices)

    monkeypatch.setattr(engine.runner, "run", noted_run)
    monkeypatch.setattr(Choices, "collect", noted_collect)
    for name in ("a", "b"):
        engine.add(name, prompt_of(20), SamplingParams(max_tokens=5, **GREEDY))
    outputs = run(engine)
    assert ids_of(outputs["a"]) == list(Generator(model).stream(prompt_of(20), 5))
    ahead = ["run", "run", "collect", "run", "collect", "run", "collect", "collect"]
    assert events == ["run", "collect", *ahead]
    # Where the end is known beforehand nothing is computed in vain, where it is not one token is.
    assert engine.stats().computed_tokens_total == 2 * (20 + 4)
    stop = ids_of(outputs["a"])[2]
    engine = make_engine(model, max_num_batched_tokens=64)
    stopped = SamplingParams(max_tokens=9, stop_token_ids=(stop,), **GREEDY)
    engine.add("a", prompt_of(20), stopped)
    first = ids_of(outputs["a"]).index(stop)
    assert ids_of(run(engine)["a"]) == ids_of(outputs["a"])[: first + 1]
    assert engine.stats().computed_tokens_total == 20 + first + 1
    assert engine.stats().generation_tokens_total == first + 1
    # What was in flight for the old request is not taken for a new one of its name.
    engine.add("a", prompt_of(31), SamplingParams(max_tokens=6, **GREEDY))
    assert ids_of(run(engine)["a"]) == list(Generator(model).stream(prompt_of(31), 6))


def test_what_is_told_of_every_token_is_not_computed_ahead(make_speaker, make_engine):
    every: list[dict[str, Any]] = [
        {"logprobs": 1},
        {"presence_penalty": 1.0},
        {"allowed_token_ids": (1, 2, 3)},
    ]
    for settings in every:
        engine = make_engine(make_speaker())
        engine.add("a", prompt_of(5), SamplingParams(max_tokens=9, **GREEDY, **settings))
        for _ in range(3):
            engine.step()
            assert engine.stats().computed_tokens_total == 4 + engine.stats().steps_total
        run(engine)


def test_a_look_at_the_branches_changes_nothing(model, make_engine):
    texts, is_sparse = [], model.config.attention.kind == "nsa"
    for every in (1, 1000):
        engine = make_engine(model)
        engine.runner.selection = SelectionSampler(engine.block_size, every=every)
        for name in ("a", "b"):
            engine.add(name, prompt_of(40), SamplingParams(max_tokens=7, **GREEDY))
        texts.append({name: ids_of(outputs) for name, outputs in run(engine).items()})
        sample = engine.stats().selection
        if every > 1 or not is_sparse:
            assert sample is None
            continue
        assert sample is not None and sample.number == 6
        assert len(sample.gate_means) == model.config.layers
        assert all(0 < mean < 1 for means in sample.gate_means for mean in means)
        # The newest query is at 45: a head reads its block, from 40 on, the first one, and another.
        assert len(sample.ages) == model.config.layers * 2 * 3
        assert sample.ages.count(5) == sample.ages.count(45) == model.config.layers * 2
        assert all(age % 8 == 5 for age in sample.ages)
    assert texts[0] == texts[1]


def test_a_decode_goes_on_in_every_step_beside_a_long_prompt(make_speaker, make_engine):
    engine = make_engine(make_speaker(), max_num_batched_tokens=8)
    engine.add("short", prompt_of(4), SamplingParams(max_tokens=20, **GREEDY))
    engine.step()
    engine.add("long", prompt_of(100), SamplingParams(max_tokens=3, **GREEDY))
    for _ in range(14):
        assert [output.request_id for output in engine.step()] == ["short"]
    assert [output.request_id for output in engine.step()] == ["short", "long"]


def test_abort_frees_the_pages_at_once(make_speaker, make_engine):
    engine = make_engine(make_speaker(), max_num_seqs=1)
    engine.add("runs", prompt_of(40), SamplingParams(max_tokens=30, **GREEDY))
    engine.add("waits", prompt_of(10), SamplingParams(max_tokens=2, **GREEDY))
    engine.add("stays", prompt_of(10), SamplingParams(max_tokens=2, **GREEDY))
    engine.step()
    assert engine.stats().pages_used == 2
    for name in ("runs", "waits"):
        output = engine.abort(name)
        assert output is not None and output.finish_reason == "abort"
        engine.check()
    assert engine.stats().pages_used == 0
    assert engine.abort("runs") is None
    assert list(run(engine)) == ["stays"]


@pytest.mark.parametrize(
    ("prompt", "params", "text"),
    [
        ([], {"max_tokens": 3}, "the prompt is empty"),
        ([1, 300], {"max_tokens": 3}, r"prompt_ids: ids must lie in \[0, 300\), got 1 to 300"),
        ([-1], {"max_tokens": 3}, "got -1 to -1"),
        ([1] * 100, {"max_tokens": 29}, r"100 prompt tokens \+ max_tokens=29 = 129 exceed"),
        ([1] * 60, {"max_tokens": 30}, "need 12 pages of 8 tokens, and the whole cache has 11"),
        ([1], {"max_tokens": 3, "logit_bias": {300: 1.0}}, "logit_bias: ids must lie in"),
        ([1], {"max_tokens": 3, "stop_token_ids": (300,)}, "stop_token_ids: ids must lie in"),
    ],
)
def test_impossible_requests_are_refused(make_speaker, make_engine, prompt, params, text):
    engine = make_engine(make_speaker(vocab_size=300), num_kv_tokens=64)
    with pytest.raises(ValueError, match=text):
        engine.add("a", prompt, SamplingParams(**params))
    assert not engine.has_work
    engine.add("a", [1] * 60, SamplingParams(max_tokens=29, **GREEDY))  # the cache to the brim
    assert len(run(engine)["a"]) == 29


def test_a_full_queue_and_a_used_id_are_refused(make_speaker, make_engine):
    engine = make_engine(make_speaker(), max_num_seqs=1, max_num_queued=2)
    for name in "abc":
        engine.add(name, [1], SamplingParams(max_tokens=2, **GREEDY))
    with pytest.raises(ValueError, match="request_id='a' is in use"):
        engine.add("a", [1], SamplingParams(max_tokens=2))
    with pytest.raises(QueueFull, match="3 requests run or wait"):
        engine.add("d", [1], SamplingParams(max_tokens=2))
    run(engine)
    engine.add("a", [1], SamplingParams(max_tokens=2))


def test_sizes_that_do_not_fit_are_refused(make_speaker, make_engine, make_model, toy_tokenizer):
    with pytest.raises(ValueError, match=r"max_model_len=129 must not exceed .*max_context=128"):
        make_engine(make_speaker(), max_model_len=129)
    with pytest.raises(ValueError, match="block_size=12 must be a multiple of 8"):
        make_engine(make_speaker(), block_size=12)
    with pytest.raises(ValueError, match="do not belong together"):
        make_engine(make_model())
    with pytest.raises(ValueError, match="max_num_batched_tokens=3 must be at least"):
        EngineConfig(max_num_seqs=4, max_num_batched_tokens=3)
    engine = make_engine(make_speaker(), max_model_len=20)
    with pytest.raises(ValueError, match="exceed max_model_len=20"):
        engine.add("a", [1] * 15, SamplingParams(max_tokens=6))
