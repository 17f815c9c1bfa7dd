"""Train-serve identity: serving selects the very blocks that the training forward selects.

Prompts are put through the engine in all its ways, and every choice of every layer, group and
token is compared with that of one forward pass over the whole sequence, as in training.
"""

from collections.abc import Iterator

import pytest
import torch

from nsa_kernels.torch_backend import paged, whole
from nsa_platform.config.serve import EngineConfig
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.transformer import Transformer
from nsa_platform.serve.engine import Engine
from nsa_platform.serve.request import SamplingParams
from nsa_platform.serve.scheduler import Step

LOGPROB_BOUND = 1e-4
"""Of float32 sums in another order; log probabilities here are around -3."""
NUM_OUTPUT = 16
LENGTHS = (30, 57, 90)

Choices = dict[tuple[int, int], tuple[tuple[int, ...], ...]]
"""(layer, position) -> for each group the chosen blocks."""


def prompt_of(length: int) -> list[int]:
    return torch.randint(
        0, 260, (length,), generator=torch.Generator().manual_seed(length)
    ).tolist()


class Recorder:
    """Notes what the kernels' choice returns, call by call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[list[int], torch.Tensor]] = []
        choose, select = paged.choose_blocks, whole.select_blocks

        def choosing(q, k_cmp, lse, positions, config, scale):
            blocks = choose(q, k_cmp, lse, positions, config, scale)
            self.calls.append((positions.tolist(), blocks))
            return blocks

        def selecting(q, *rest):
            blocks = select(q, *rest)
            self.calls.append((list(range(len(q))), blocks))
            return blocks

        monkeypatch.setattr(paged, "choose_blocks", choosing)
        monkeypatch.setattr(whole, "select_blocks", selecting)

    def take(self, num_layers: int) -> Iterator[tuple[int, int, Choices]]:
        """(layer, number of the sequence in the batch, its choices) of one forward pass."""
        calls, self.calls = self.calls, []
        num_sequences, rest = divmod(len(calls), num_layers)
        assert num_sequences and not rest
        for index, (positions, blocks) in enumerate(calls):
            layer, number = divmod(index, num_sequences)
            rows = [tuple(map(tuple, row)) for row in blocks.tolist()]
            yield (
                layer,
                number,
                {(layer, position): row for position, row in zip(positions, rows, strict=True)},
            )


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    return Recorder(monkeypatch)


@torch.no_grad()
def trained(model: Transformer, ids: list[int], recorder: Recorder) -> tuple[Choices, torch.Tensor]:
    """Choices and log probabilities [T, vocab] of the training forward."""
    logits = model.logits(model(torch.tensor(ids), PackedInputs.from_lengths([len(ids)])).hidden)
    choices: Choices = {}
    for _, _, found in recorder.take(len(model.layers)):
        choices |= found
    return choices, logits.log_softmax(-1)


def served(
    engine: Engine, prompts: dict[str, list[int]], recorder: Recorder
) -> dict[str, tuple[Choices, list[int], list[float]]]:
    """Choices, generated ids and their log probabilities, by request."""
    choices: dict[str, Choices] = {name: {} for name in prompts}
    run = engine.runner.run

    def recorded(step: Step, unknown_ids: torch.Tensor | None = None) -> torch.Tensor | None:
        scores = run(step, unknown_ids)
        for _, number, found in recorder.take(len(engine.cache.layers)):
            choices[step.chunks[number].request.request_id] |= found
        return scores

    engine.runner.run = recorded
    params = SamplingParams(max_tokens=NUM_OUTPUT, temperature=0.0, ignore_eos=True, logprobs=0)
    for name, prompt in prompts.items():
        engine.add(name, prompt, params)
    ids: dict[str, list[int]] = {name: [] for name in prompts}
    logprobs: dict[str, list[float]] = {name: [] for name in prompts}
    while engine.has_work:
        for output in engine.step():
            ids[output.request_id] += output.token_ids
            logprobs[output.request_id] += [entry.logprob for entry in output.logprobs or ()]
        engine.check()
    engine.runner.run = run
    return {name: (choices[name], ids[name], logprobs[name]) for name in prompts}


def check(model: Transformer, prompt: list[int], result, recorder: Recorder) -> set[int]:
    """Compare with training; which positions the engine computed."""
    choices, ids, logprobs = result
    seen = prompt + ids[:-1]  # the last token is not put through the model
    wanted, scores = trained(model, seen, recorder)
    positions = {position for _, position in choices}
    assert positions <= set(range(len(seen)))
    assert positions >= set(range(len(prompt) - 1, len(seen)))
    different = {key for key, blocks in choices.items() if blocks != wanted[key]}
    assert not different
    assert len(set(choices.values())) > 10  # there is something to choose
    rows = scores[len(prompt) - 1 :]
    expected = rows.gather(1, torch.tensor(ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0.0, atol=LOGPROB_BOUND)
    return positions


@pytest.fixture(scope="module", params=["separate", "shared"])
def model(request, make_speaker):
    return make_speaker({"branch_kv": request.param})


@pytest.fixture
def make_engine(model, toy_tokenizer):
    def make(**sizes) -> Engine:
        sizes = {"max_num_seqs": 1, "max_num_batched_tokens": 16, **sizes}
        return Engine(model, toy_tokenizer, EngineConfig(**sizes))

    return make


@pytest.mark.parametrize("chunk", [5, 16, 200])
def test_chunked_prefill_and_decode_select_as_training_does(model, make_engine, recorder, chunk):
    engine = make_engine(max_num_batched_tokens=chunk)
    for length in LENGTHS:
        prompt = prompt_of(length)
        result = served(engine, {"a": prompt}, recorder)["a"]
        assert len(check(model, prompt, result, recorder)) == length + NUM_OUTPUT - 1


def test_strangers_change_nothing(model, make_engine, recorder):
    prompts = {str(length): prompt_of(length) for length in (*LENGTHS, 41, 66)}
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=24)
    for name, result in served(engine, prompts, recorder).items():
        check(model, prompts[name], result, recorder)


def test_a_prefix_hit_changes_nothing(model, make_engine, recorder):
    engine = make_engine()
    for length in LENGTHS:
        prompt = prompt_of(length)
        first = served(engine, {"first": prompt}, recorder)["first"]
        again = served(engine, {"again": prompt}, recorder)["again"]
        assert again[1] == first[1]
        assert min(check(model, prompt, again, recorder)) == (length - 4) // 8 * 8


def test_a_preemption_changes_nothing(model, make_engine, recorder):
    prompts = {str(length): prompt_of(length) for length in (30, 33, 41)}
    engine = make_engine(max_num_seqs=3, max_num_batched_tokens=24, num_kv_tokens=72)
    results = served(engine, prompts, recorder)
    assert engine.stats().preemptions_total > 0
    for name, result in results.items():
        check(model, prompts[name], result, recorder)
