"""Shares of prompts: short ones first, and nobody falls behind by more than a bound."""

from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_platform.serve.page_keys import PageKeys
from nsa_platform.serve.prompt_shares import PromptShares
from nsa_platform.serve.request import Request, SamplingParams
from nsa_platform.serve.step_cost import CostModel


def prompt(number: int, num_tokens: int, priority: int = 0) -> Request:
    return Request(
        str(number),
        (0,) * num_tokens,
        SamplingParams(max_tokens=1),
        arrival=number,
        seed=0,
        keys=PageKeys((), page_size=64, lookahead=0),
        num_to_compute=num_tokens,
        priority=priority,
    )


def test_the_shortest_goes_first_and_the_rest_goes_on():
    shares = PromptShares(CostModel(), max_deficit=100)
    long, short, other = prompt(0, 500), prompt(1, 30), prompt(2, 60)
    assert shares.split([long, short, other], 100, float("inf")) == {short: 30, other: 60, long: 10}


def test_time_counts_with_the_context():
    # A token costs as many seconds as it reads.
    shares = PromptShares(CostModel((0.0, 0.0, 0.0, 1.0, 0.0, 0.0)), max_deficit=100)
    fresh, old = prompt(0, 1000), prompt(1, 1000)
    old.pages.num_tokens = 900
    assert shares.split([fresh], 1000, 50.0) == {fresh: 10}
    assert shares.split([old], 1000, 1800.0) == {old: 1}
    assert shares.split([old], 1000, 10.0) == {}


def test_priorities_are_strict():
    shares = PromptShares(CostModel(), max_deficit=0)
    low, high = prompt(0, 10), prompt(1, 90, priority=-1)
    low.deficit = 50.0
    assert shares.split([low, high], 95, float("inf")) == {high: 90, low: 5}
    shares.book([low, high], {high: 90, low: 5})
    assert (low.deficit, high.deficit) == (50.0, 0.0)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 3000), min_size=2, max_size=6),
    budget=st.integers(1, 200),
    max_deficit=st.integers(0, 400),
)
def test_nobody_falls_behind(lengths, budget, max_deficit):
    shares = PromptShares(CostModel(), max_deficit=max_deficit)
    prompts = [prompt(number, length) for number, length in enumerate(lengths)]
    num_left = sum(lengths)
    while prompts:
        taken = shares.split(prompts, budget, float("inf"))
        # No token of the step is left while anybody could use it.
        assert sum(taken.values()) == min(budget, num_left)
        num_left -= sum(taken.values())
        shares.book(prompts, taken)
        for request, count in taken.items():
            request.pages.num_tokens += count
        for request in prompts:
            # A step's share may come on top, once for each of those that are owed more.
            assert request.deficit <= max_deficit + len(lengths) * budget
        prompts = [request for request in prompts if request.num_pending]
