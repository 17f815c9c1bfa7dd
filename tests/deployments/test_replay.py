"""Policies on one trace in the simulator: ours keeps more promises and costs no more."""

import json

import pytest

from deployments.autoscaling import PressurePolicy
from deployments.replay import (
    Delayed,
    by_pressure,
    by_requests,
    mixed_trace,
    replay,
    violations,
)
from jobs.scaling_study import RECORD
from nsa_platform.serve.simulator import ReplicaLoad, ScalingState, TraceRequest


def state(now_s: float, num_target: int) -> ScalingState:
    return ScalingState(now_s, 5.0, num_target, num_starting=0, num_unrouted=0)


def test_delays_and_bounds_are_kept():
    wish = {"now": 5.0}
    delayed = Delayed(
        lambda *_: wish["now"], upscale_delay_s=10, downscale_delay_s=20, max_replicas=4
    )
    assert [delayed.target({}, state(s, 1)) for s in (0, 5, 10)] == [1, 1, 4]
    wish["now"] = 0.2
    assert [delayed.target({}, state(s, 4)) for s in (15, 25, 35)] == [4, 4, 1]
    wish["now"] = 2.0
    assert delayed.target({}, state(40, 1)) == 1
    wish["now"] = 1.0
    assert [delayed.target({}, state(s, 1)) for s in (45, 60)] == [1, 1]
    wish["now"] = 2.0
    assert delayed.target({}, state(65, 1)) == 1, "the wish was interrupted: its time begins anew"


def test_rays_policy_counts_requests_over_a_while():
    decide = by_requests(2.0, look_back_s=10.0)
    load = ReplicaLoad(4, 2, 0, 0, 100, 0.0)
    assert decide({0: load}, state(0, 1)) == 3.0
    assert decide({}, state(5, 1)) == 1.5
    assert decide({}, state(10, 1)) == 0.0


def test_chats_that_one_replica_can_serve_buy_no_others():
    chats = mixed_trace(45, phase_s=45)
    ours = replay(chats, by_pressure(PressurePolicy()))
    # target_ongoing_requests=2 is Ray Serve's default.
    theirs = replay(chats, by_requests(2.0))
    assert violations(ours) == violations(theirs) == 0
    assert max(count for _, count in ours.num_replicas) == 1
    assert max(count for _, count in theirs.num_replicas) > 4
    assert ours.replica_seconds < theirs.replica_seconds / 2


def test_a_few_long_documents_buy_some():
    documents = [TraceRequest(2.0 * place, 200_000, 4) for place in range(6)]
    ours = replay(documents, by_pressure(PressurePolicy()))
    assert max(count for _, count in ours.num_replicas) > 1
    assert all(record.end_s is not None for record in ours.records)


def test_the_record_shows_more_promises_kept_at_no_more_replica_seconds():
    runs = json.loads(RECORD.read_text())["runs"]
    ours, theirs = runs["pressure"], runs["2 requests"]
    assert ours["violations"] < theirs["violations"]
    assert ours["replica_seconds"] <= theirs["replica_seconds"]


def test_a_trace_alternates():
    trace = mixed_trace(100, phase_s=50)
    chats = [request for request in trace if request.arrival_s < 50]
    documents = [request for request in trace if 55 < request.arrival_s]
    assert len(chats) > 5 * len(documents) > 0
    assert max(request.num_prompt_tokens for request in chats) < 20_000
    assert min(request.num_prompt_tokens for request in documents) >= 80_000
    assert pytest.approx(5, rel=0.2) == len(chats) / 50
    assert trace == mixed_trace(100, phase_s=50) != mixed_trace(100, phase_s=50, seed=1)
