"""Streams of ids equal what recomputing the whole sequence for every token gives."""

import pytest
import torch

from nsa_platform.model.inputs import PackedInputs
from nsa_platform.serve.generator import Generator
from nsa_platform.serve.sampler import Sampling

MLA = {
    "kind": "mla",
    "kv_lora_rank": 24,
    "key_width": 16,
    "rotary_width": 8,
    "value_width": 8,
}
MOE = {"routed_experts": 4, "experts_per_token": 2, "expert_width": 16}


def prompt_of(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, 61, (length,), generator=generator).tolist()


@torch.no_grad()
def recomputed(model, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        hidden = model(torch.tensor(ids), PackedInputs.from_lengths([len(ids)])).hidden
        ids.append(int(model.logits(hidden[-1]).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("length", [1, 3, 4, 7, 8, 9, 11, 12, 13, 15, 16, 17, 31, 32, 33, 48])
@pytest.mark.parametrize("attention", [{}, {"kind": "full"}], ids=["nsa", "full"])
def test_greedy_equals_recomputing_from_scratch(make_model, attention, length):
    model = make_model(attention, tie_embeddings=False)  # tied, a toy model repeats itself
    wanted = recomputed(model, prompt_of(length), 18)
    assert len(set(wanted)) > 3
    for chunk, blocks_per_page in ((5, 1), (64, 2)):
        generator = Generator(model, prefill_chunk=chunk, blocks_per_page=blocks_per_page)
        assert list(generator.stream(prompt_of(length), 18)) == wanted


@pytest.mark.parametrize(
    ("attention", "fields"),
    [
        ({"branch_kv": "shared"}, {}),
        ({"window_size": 3}, {}),
        ({}, {"moe": MOE}),
        ({"compressed_rotary": "before"}, {}),
        ({}, {"yarn": {"factor": 2, "original_context": 64}}),
        ({"gates": "none"}, {}),
        ({"branches": ["sliding"]}, {}),
        (MLA, {}),
        (MLA, {"yarn": {"factor": 2, "original_context": 64}}),
        (
            {"branches": ["selected", "sliding"], "branch_kv": "shared", "compression": "mean"},
            {},
        ),
    ],
)
def test_greedy_equals_recomputing_for_other_models(make_model, attention, fields):
    model = make_model(attention, **fields)
    generator = Generator(model, prefill_chunk=6)
    assert list(generator.stream(prompt_of(21), 30)) == recomputed(model, prompt_of(21), 30)


def test_a_stop_id_ends_the_stream_and_is_not_yielded(make_model):
    generator = Generator(make_model())
    whole = list(generator.stream(prompt_of(20), 12))
    stop = whole[5]
    assert list(generator.stream(prompt_of(20), 12, stop_ids={stop})) == whole[: whole.index(stop)]


def test_streams_can_be_taken_in_turns(make_model):
    generator = Generator(make_model())
    alone = [list(generator.stream(prompt_of(n), 10)) for n in (9, 30)]
    streams = [generator.stream(prompt_of(n), 10) for n in (9, 30)]
    turns = [[next(stream) for stream in streams] for _ in range(10)]
    assert [list(column) for column in zip(*turns, strict=True)] == alone


def test_sampling_is_repeatable_by_its_seed(make_model):
    generator = Generator(make_model())

    def sample(seed: int) -> list[int]:
        sampling = Sampling(temperature=2.0, seed=seed)
        return list(generator.stream(prompt_of(9), 20, sampling=sampling))

    assert sample(1) == sample(1) != sample(2)


def test_the_whole_context_can_be_used(make_model):
    model = make_model()
    assert len(list(Generator(model).stream(prompt_of(100), 28))) == 28


@pytest.mark.parametrize(
    ("prompt", "count", "text"),
    [
        ([], 3, "prompt_ids is empty"),
        ([1, 61], 3, r"\[0, 61\), got 1 to 61"),
        ([-1], 3, "got -1 to -1"),
        ([1], 0, "max_new_tokens=0"),
        ([1] * 100, 29, "max_context=128"),
    ],
)
def test_impossible_requests_are_refused_before_the_first_id(make_model, prompt, count, text):
    with pytest.raises(ValueError, match=text):
        Generator(make_model()).stream(prompt, count)


def test_a_chunk_must_be_positive(make_model):
    with pytest.raises(ValueError, match="prefill_chunk=0"):
        Generator(make_model(), prefill_chunk=0)
