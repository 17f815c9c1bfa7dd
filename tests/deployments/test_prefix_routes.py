"""Routes: follow-up turns find the replica that holds their beginning; load has the last word."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.prefix_routes import (
    BLOCK_CHARACTERS,
    BLOCK_TOKENS,
    Load,
    PrefixRoutes,
    prefix_keys,
)
from deployments.protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest

FREE = {"a": Load(0), "b": Load(0), "c": Load(0)}


def chat(*contents: str) -> ChatCompletionRequest:
    roles = ("user", "assistant")
    messages: Any = [
        {"role": roles[place % 2], "content": text} for place, text in enumerate(contents)
    ]
    return ChatCompletionRequest(model="m", messages=messages)


def test_a_follow_up_turn_has_its_first_turns_beginnings():
    first = prefix_keys(chat("hello"))
    second = prefix_keys(chat("hello", "hi", "and now?"))
    assert second[: len(first)] == first and len(second) == 3
    assert prefix_keys(chat("hello!"))[0] != first[0]
    assert prefix_keys(chat("hel", "lo"))[-1] != first[-1]
    long = "x" * (2 * BLOCK_CHARACTERS + 1)
    assert len(prefix_keys(chat(long))) == 3
    assert prefix_keys(chat(long + "y"))[:2] == prefix_keys(chat(long))[:2]


def test_texts_and_ids_are_cut_alike():
    text = prefix_keys(CompletionRequest(model="m", prompt="x" * 3 * BLOCK_CHARACTERS))
    more = prefix_keys(CompletionRequest(model="m", prompt="x" * 3 * BLOCK_CHARACTERS + "y"))
    assert more[:3] == text and len(more) == 4
    ids = prefix_keys(CompletionRequest(model="m", prompt=[7] * (BLOCK_TOKENS + 1)))
    assert len(ids) == 2
    assert prefix_keys(CompletionRequest(model="m2", prompt=[7] * BLOCK_TOKENS))[0] != ids[0]
    assert prefix_keys(CompletionRequest(model="m", prompt=["a", "b"])) == []
    assert prefix_keys(DetokenizeRequest(tokens=[1])) == []


def test_the_holder_comes_first_and_then_the_idle():
    routes = PrefixRoutes[str](max_imbalance=4)
    first = prefix_keys(chat("hello"))
    routes.routed(first, "b")
    second = prefix_keys(chat("hello", "hi", "and now?"))
    assert routes.ranked(second, FREE)[0] == "b"
    assert routes.ranked(prefix_keys(chat("other")), {**FREE, "a": Load(2)})[-1] == "a"
    busy = {"a": Load(3), "b": Load(4), "c": Load(1)}
    assert routes.ranked(second, busy) == ["b", "c", "a"]
    full = {"a": Load(3), "b": Load(6), "c": Load(1)}
    assert routes.ranked(second, full) == ["c", "a", "b"], "more than 4 busier than c"
    waiting = {"a": Load(0), "b": Load(0, predicted_ttft_s=5.0)}
    assert routes.ranked(second, waiting) == ["a", "b"]
    assert routes.ranked(second, {"a": Load(0)}) == ["a"], "b has gone"


def test_the_longest_beginning_counts():
    routes = PrefixRoutes[str]()
    system = prefix_keys(chat("system"))
    routes.routed(system, "a")
    routes.routed(prefix_keys(chat("system", "x", "y")), "b")
    assert routes.ranked(prefix_keys(chat("system", "x", "y", "z", "w")), FREE)[0] == "b"
    # Both hold the first turn now: the less busy of the two.
    assert routes.ranked(system, {**FREE, "a": Load(1)})[0] == "b"
    assert routes.ranked(system, {**FREE, "b": Load(1)})[0] == "a"


def test_what_is_remembered_is_bounded():
    routes = PrefixRoutes[str](max_prefixes=3, max_holders=2)
    for place in range(10):
        routes.routed(prefix_keys(chat(str(place))), "a")
    assert len(routes) == 3
    kept, lost = prefix_keys(chat("9")), prefix_keys(chat("0"))
    busy = {**FREE, "a": Load(2)}
    assert routes.ranked(kept, busy)[0] == "a" != routes.ranked(lost, busy)[0]
    for replica in "abc":
        routes.routed(kept, replica)
    assert routes.ranked(kept, {"a": Load(1), "b": Load(2), "c": Load(3)})[0] == "b"
    for wrong in ({"max_imbalance": -1}, {"max_prefixes": 0}, {"max_holders": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PrefixRoutes(**wrong)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=30),
    st.dictionaries(st.integers(0, 3), st.builds(Load, st.integers(0, 20)), min_size=1),
)
def test_every_replica_is_offered_once_and_none_that_is_too_busy_first(history, loads):
    routes = PrefixRoutes[int](max_imbalance=3)
    for name, replica in history:
        routes.routed(prefix_keys(chat(str(name))), replica)
    for name in range(6):
        ranked = routes.ranked(prefix_keys(chat(str(name))), loads)
        assert sorted(ranked) == sorted(loads)
        idlest = min(load.weight for load in loads.values())
        assert loads[ranked[0]].weight <= idlest + 3
