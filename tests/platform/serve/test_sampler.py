"""Sampling: greedy, and draws that follow the distribution that was asked for."""

from typing import Any

import pytest
import torch

from nsa_platform.serve.batch_sampler import BatchSampler
from nsa_platform.serve.grammar import Grammars
from nsa_platform.serve.page_keys import PageKeys
from nsa_platform.serve.request import Request, SamplingParams
from nsa_platform.serve.sampler import Sampler, Sampling, choose_tokens, uniform

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 2.0])


def draws(sampling: Sampling, count: int = 4000) -> torch.Tensor:
    sampler = Sampler(sampling)
    picks = torch.tensor([sampler.pick(LOGITS) for _ in range(count)])
    return picks.bincount(minlength=len(LOGITS)).double() / count


def test_greedy_takes_the_first_of_the_likeliest():
    assert Sampler(Sampling()).pick(LOGITS) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    wanted = (LOGITS.double() / temperature).softmax(-1)
    found = draws(Sampling(temperature=temperature, seed=3))
    torch.testing.assert_close(found, wanted, atol=0.03, rtol=0)


def test_top_k_keeps_the_likeliest():
    wanted = LOGITS.double().masked_fill(torch.tensor([1, 0, 1, 0, 0]) > 0, -torch.inf).softmax(-1)
    found = draws(Sampling(temperature=1.0, top_k=3, seed=3))
    torch.testing.assert_close(found, wanted, atol=0.03, rtol=0)
    assert draws(Sampling(temperature=1.0, top_k=1, seed=3), 50)[1] == 1.0


def test_top_p_keeps_the_least_set_that_reaches_it():
    # Probabilities in order: .38 .38 .14 .09 .02 (rounded).
    for top_p, kept in ((0.3, {1}), (0.4, {1, 4}), (0.8, {1, 3, 4}), (1.0, {0, 1, 2, 3, 4})):
        found = draws(Sampling(temperature=1.0, top_p=top_p, seed=3), 800)
        assert set(found.nonzero().flatten().tolist()) == kept


def test_min_p_keeps_those_near_the_likeliest():
    # Against the likeliest: 1, 1, .37, .22, .05 (rounded).
    for min_p, kept in ((1.0, {1, 4}), (0.3, {1, 3, 4}), (0.1, {0, 1, 3, 4}), (0.01, {*range(5)})):
        found = draws(Sampling(temperature=1.0, min_p=min_p, seed=3), 800)
        assert set(found.nonzero().flatten().tolist()) == kept


def test_top_p_counts_what_top_k_and_min_p_have_left():
    cuts: list[dict[str, Any]] = [{"top_k": 3}, {"min_p": 0.3}]  # .42, .42, .16
    for cut in cuts:
        found = draws(Sampling(temperature=1.0, top_p=0.8, seed=3, **cut), 800)
        assert set(found.nonzero().flatten().tolist()) == {1, 4}


@pytest.mark.parametrize("temperature", [1e-6, 1e-300])
def test_the_coldest_draw_takes_one_of_the_likeliest(temperature):
    found = draws(Sampling(temperature=temperature, seed=3), 50)
    assert set(found.nonzero().flatten().tolist()) == {1, 4}


def test_a_draw_at_the_very_end_is_an_eligible_token():
    cuts: list[dict[str, Any]] = [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.9}]
    for settings in cuts:
        choice = Sampling(temperature=1.0, **settings)
        picked = choose_tokens(LOGITS[None], [choice], [1.0 - 2.0**-53])
        assert picked.tolist() == [2 if not settings else 4]


def test_rows_are_chosen_by_their_own_settings():
    choices = [
        Sampling(),
        Sampling(temperature=1.0),
        Sampling(temperature=2.0, top_k=3),
        Sampling(temperature=1.0, min_p=0.3, top_p=0.7),
        Sampling(temperature=0.7, top_p=0.5),
    ]
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    for attempt in range(20):
        points = [uniform(row, attempt) for row in range(5)]
        together = choose_tokens(logits, choices, points).tolist()
        alone = [
            choose_tokens(logits[row : row + 1], choices[row : row + 1], points[row : row + 1])
            for row in range(5)
        ]
        assert together == [int(picked) for picked in alone]


def test_uniform_numbers_are_spread_and_hang_on_seed_and_index():
    numbers = torch.tensor([uniform(5, index) for index in range(4000)], dtype=torch.float64)
    assert 0.0 <= float(numbers.min()) and float(numbers.max()) < 1.0
    shares = torch.histc(numbers, 10, 0.0, 1.0) / len(numbers)
    torch.testing.assert_close(shares, torch.full_like(shares, 0.1), atol=0.02, rtol=0)
    assert len({uniform(seed, index) for seed in range(30) for index in range(30)}) == 900
    assert uniform(-1, 3) == uniform(-1, 3) != uniform(1, 3)


@pytest.fixture
def batch_sampler(toy_tokenizer):
    grammars = Grammars(toy_tokenizer, vocab_size=toy_tokenizer.vocab_size)
    return lambda: BatchSampler(grammars)


def request_of(prompt: list[int], output: list[int], **settings: Any) -> Request:
    params = SamplingParams(**{"max_tokens": 50, "temperature": 0.0, **settings})
    name = f"{prompt}{output}{settings}"
    stop_ids = frozenset({3})
    return Request(
        name,
        tuple(prompt),
        params,
        arrival=0,
        seed=0,
        keys=PageKeys(prompt, page_size=8, lookahead=0),
        num_to_compute=len(prompt),
        output_ids=output,
        stop_ids=stop_ids,
    )


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        # Scores .5, 2, -1, 1, 2; the prompt holds 1 and 2, the output 4 twice and 3 once.
        ({}, 1),
        ({"repetition_penalty": 3.0}, 1),  # .5, .67, -3, .33, .67
        ({"repetition_penalty": 5.0}, 0),  # .5, .4, -5, .2, .4
        ({"presence_penalty": 1.9}, 1),
        ({"presence_penalty": 1.9, "logit_bias": {1: -1.7}}, 0),  # .5, .3, -1, -.9, .1
        ({"frequency_penalty": 0.8, "logit_bias": {1: -1.7}}, 0),  # .5, .3, -1, .2, .4
        ({"frequency_penalty": 0.7, "logit_bias": {1: -1.7}}, 4),  # .5, .3, -1, .3, .6
        ({"logit_bias": {2: 4.0}}, 2),
        ({"logit_bias": {3: 4.0}}, 3),
        ({"logit_bias": {3: 4.0}, "min_tokens": 4}, 1),
        ({"logit_bias": {3: 4.0}, "min_tokens": 3}, 3),
        ({"allowed_token_ids": (0, 2)}, 0),
        ({"allowed_token_ids": (2,), "logit_bias": {2: -100.0}}, 2),
        ({"bad_words": ((1,), (0, 4))}, 4),
        ({"bad_words": ((1,), (3, 4, 4))}, 3),  # 4, 3, 4 would become ..., 3, 4, 4
        ({"allowed_token_ids": (1,), "bad_words": ((1,),)}, None),
    ],
)
def test_scores_are_edited_for_each_request(batch_sampler, settings, wanted):
    requests = [
        request_of([1], [0]),
        request_of([1, 2], [4, 3, 4], **settings),
        request_of([0], [], logit_bias={2: 9.0}),
    ]
    logits = LOGITS.repeat(3, 1)
    sampled = batch_sampler().sample(logits, requests)
    assert [one.token_id for one in sampled] == [1, wanted, 2]
    assert torch.equal(logits, LOGITS.repeat(3, 1))


def test_penalties_follow_the_output_as_it_grows(batch_sampler):
    sampler, request = batch_sampler(), request_of([0], [], frequency_penalty=0.6)
    picked = []
    for _ in range(12):
        picked.append(sampler.sample(LOGITS[None], [request])[0].token_id)
        request.output_ids.append(picked[-1])
    scores, wanted = LOGITS.tolist(), []
    for _ in range(12):
        wanted.append(max(range(5), key=lambda token: round(scores[token], 4)))
        scores[wanted[-1]] -= 0.6
    assert picked == wanted
    # Another sampler, as after a restart, comes to the same from the request alone.
    again = batch_sampler().sample(LOGITS[None], [request])
    assert again == sampler.sample(LOGITS[None], [request])


def test_the_seed_decides():
    def picks(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler.pick(LOGITS) for _ in range(40)]

    assert picks(1) == picks(1) != picks(2)
    assert picks(None) != picks(None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.1),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        Sampling(**{field: value})
