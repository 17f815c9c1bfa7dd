"""The autoscaling policy: what it asks for, that it does not swing, and what Ray hands it."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.config import AutoscalingPolicy

from deployments.autoscaling import KvPressurePolicy, PressurePolicy, ReplicaLoad

POLICY = PressurePolicy(
    target_kv_usage=0.7, target_queued_tokens=1000, target_ttft_s=2.0, shrink_at=0.7, max_growth=2.0
)
IDLE = ReplicaLoad(0.0, 0.0, 0.0, 0.0)


def spread(
    replicas: int, *, pages: float = 0.0, tokens: float = 0.0, wait_s: float = 0.0
) -> list[ReplicaLoad]:
    """A load in units of one replica, spread evenly."""
    return [ReplicaLoad(pages / replicas, tokens / replicas, wait_s / replicas, 1.0)] * replicas


@pytest.mark.parametrize(
    ("loads", "current", "num_waiting", "desired"),
    [
        ([], 0, 0, 0),
        ([IDLE], 1, 0, 0),
        ([IDLE, IDLE], 2, 0, 0),
        ([], 0, 3, 1),  # the first request wakes a model that sleeps
        ([], 2, 3, 2),  # those that start are not doubled
        (spread(1, pages=0.5), 1, 0, 1),
        (spread(1, pages=0.8), 1, 0, 2),
        (spread(2, pages=1.8), 2, 0, 3),
        (spread(1, wait_s=3.0), 1, 0, 2),
        (spread(2, tokens=2900.0), 2, 0, 3),
        (spread(2, wait_s=100.0), 2, 0, 4),  # no more than doubled at once
        (spread(2, pages=1.0), 2, 0, 2),  # 1.43 needed: one would be too full, so two stay
        (spread(4, pages=1.0), 4, 0, 3),  # 1.43 / 0.7 = 2.04
        (spread(1, pages=0.1), 1, 5, 2),  # they wait, so there is no place
        (spread(3, pages=0.2), 3, 0, 1),
    ],
)
def test_what_is_asked_for(loads, current, num_waiting, desired):
    assert POLICY.desired(loads, current=current, num_waiting=num_waiting) == desired


LOADS = st.builds(
    ReplicaLoad, st.floats(0, 1), st.floats(0, 1e9), st.floats(0, 1e6), st.floats(0, 1e4)
)


@given(pages=st.floats(0.01, 20), wait_s=st.floats(0, 60), current=st.integers(1, 40))
def test_a_steady_load_settles_and_stays(pages, wait_s, current):
    seen = [current]
    for _ in range(12):
        loads = spread(seen[-1], pages=pages, wait_s=wait_s)
        seen.append(POLICY.desired(loads, current=seen[-1], num_waiting=0))
    assert seen[-1] == seen[-2] == seen[-3]
    needed = max(pages / 0.7, wait_s / 2.0)
    assert needed - 1e-6 <= seen[-1] <= max(1, needed / 0.7 + 1)
    # One direction only: it never overshoots and comes back.
    assert seen in (sorted(seen), sorted(seen, reverse=True))


@given(
    st.lists(LOADS, max_size=8),
    st.integers(0, 8),
    st.floats(0, 1e6),
)
def test_any_load_gets_a_sane_answer(loads, current, num_waiting):
    desired = POLICY.desired(loads, current=current, num_waiting=num_waiting)
    assert isinstance(desired, int)
    assert 0 <= desired <= max(2 * current, 1, 2 * len(loads) + 1)
    if num_waiting or any(load.num_requests for load in loads):
        assert desired >= 1, "nobody is left with nobody to answer"


def context(**fields: Any) -> Any:
    metrics = {
        "kv_cache_usage": {"a": 0.9, "b": 0.9},
        "queued_prefill_tokens": {"a": 10.0, "b": 10.0},
        "predicted_ttft_s": {"a": 0.1, "b": 0.1},
        "num_requests": {"a": 4.0, "b": 4.0},
    }
    settings = {
        "aggregated_metrics": metrics,
        "running_replicas": ["a", "b"],
        "target_num_replicas": 2,
        "total_queued_requests": 0.0,
    }
    return SimpleNamespace(**{**settings, **fields})


def test_ray_finds_and_calls_it():
    policy = AutoscalingPolicy(
        policy_function="deployments.autoscaling:KvPressurePolicy",
        policy_kwargs={"target_kv_usage": 0.6},
    )
    found = policy.get_policy()(**policy.policy_kwargs)
    assert found(context()) == (3, {})
    assert found(context(running_replicas=["a"])) == (2, {}), "b has gone, its numbers are old"
    assert found(context(aggregated_metrics={})) == (0, {})
    waiting = context(aggregated_metrics={}, total_queued_requests=2.0)
    assert found(waiting) == (2, {}), "replicas that have not reported yet are not idle"


@pytest.mark.parametrize(
    "settings",
    [
        {"target_kv_usage": 0},
        {"target_kv_usage": 1.1},
        {"target_queued_tokens": 0},
        {"target_ttft_s": 0},
        {"shrink_at": 1},
        {"max_growth": 1},
    ],
)
def test_values_out_of_range_are_named(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        KvPressurePolicy(**settings)
