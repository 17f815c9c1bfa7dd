"""Sampling: greedy, and draws that follow the distribution that was asked for."""

import pytest
import torch

from nsa_platform.serve.sampler import Sampler, Sampling

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
        found = draws(Sampling(temperature=1.0, top_p=top_p, seed=3))
        assert set(found.nonzero().flatten().tolist()) == kept


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
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        Sampling(**{field: value})
