"""Replays: short prompts beside a long one, prefixes, replicas that come and go."""

import random

import pytest

from nsa_platform.serve.pages import PageBook
from nsa_platform.serve.scheduler import Limits, Scheduler
from nsa_platform.serve.simulator import (
    FewestQueuedTokens,
    Record,
    Simulator,
    TraceRequest,
)
from nsa_platform.serve.step_cost import CostModel

# Of the order of a model of a billion parameters on one GPU: 20 ms of launches, 50,000 prompt
# tokens a second at the beginning of a context and half as many at 256k.
COST = (0.02, 0.0, 2e-5, 8e-11, 2e-4, 1e-9)


def make_scheduler(**limits) -> Scheduler:
    limits = {"max_num_seqs": 32, "max_step_tokens": 8192, "max_step_s": 0.04, **limits}
    book = PageBook(
        page_size=64,
        num_pages=12_000,
        tail_tokens=512,
        num_window_pages=2000,
        enable_prefix_caching=True,
        lookahead=16,
    )
    return Scheduler(book, Limits(**limits), CostModel(COST))


def p99(records: list[Record]) -> float:
    times = sorted(record.ttft_s for record in records if record.ttft_s is not None)
    return times[int(0.99 * (len(times) - 1))]


def short_prompts(count: int, seconds: float, seed: int = 0) -> list[TraceRequest]:
    chance = random.Random(seed)
    times = sorted(chance.uniform(0.0, seconds) for _ in range(count))
    return [TraceRequest(time, 1000, 8) for time in times]


def test_short_prompts_hardly_notice_a_long_one():
    # 256k tokens take about fifteen seconds; a short prompt a second comes meanwhile.
    long = TraceRequest(0.0, 256 * 1024, 4)
    idle = p99(Simulator(make_scheduler).run([TraceRequest(0.0, 1000, 1)]).records)
    alone = Simulator(make_scheduler).run([long]).records[0]
    found: dict[float | None, list[Record]] = {0.04: [], None: []}
    for max_step_s, records in found.items():
        for seed in range(6):
            shorts = short_prompts(10, 10.0, seed)
            simulator = Simulator(lambda seconds=max_step_s: make_scheduler(max_step_s=seconds))
            first, *others = simulator.run([long, *shorts]).records
            records += others
            if max_step_s is not None:
                # The long one pays for what the short ones take, and not much more.
                assert first.first_token_s is not None and alone.first_token_s is not None
                assert first.first_token_s > max(request.arrival_s for request in shorts)
                assert first.first_token_s < alone.first_token_s + 10 * (idle + 8 * 0.005)
    assert p99(found[0.04]) <= 3 * idle
    # Steps that are as long as tokens make them do not keep that promise.
    assert p99(found[None]) > 3 * idle


def test_promises_are_kept_when_too_much_comes():
    chance = random.Random(3)
    trace = [
        TraceRequest(chance.uniform(0, 30), chance.choice([500, 4000, 60_000]), 20)
        for _ in range(150)
    ]
    records = Simulator(make_scheduler, max_ttft_s=5.0).run(trace).records
    refused = [record for record in records if record.retry_after_s is not None]
    assert 0 < len(refused) < 100
    assert all(record.retry_after_s and record.retry_after_s > 0 for record in refused)
    assert p99([record for record in records if record.retry_after_s is None]) < 1.5 * 5.0
    assert all((r.end_s is None) == (r.retry_after_s is not None) for r in records)


def test_known_prefixes_are_not_computed_again():
    turns = [
        TraceRequest(10.0 * turn, 30_000 + 500 * turn, 4, prefix_group=7, num_prefix_tokens=29_000)
        for turn in range(4)
    ]
    records = Simulator(make_scheduler).run(turns).records
    assert [record.num_cached_tokens >= 28_900 for record in records] == [False, True, True, True]
    assert records[3].ttft_s is not None and records[0].ttft_s is not None
    assert records[3].ttft_s < records[0].ttft_s / 4


class Sticky:
    """A router that keeps a group on one replica."""

    def choose(self, request, replicas, now_s) -> int:
        return sorted(replicas)[request.prefix_group % len(replicas)]


def test_the_router_decides():
    trace = [TraceRequest(0.1 * n, 2000, 3, prefix_group=n % 2) for n in range(20)]
    sticky = Simulator(make_scheduler, router=Sticky(), num_replicas=2).run(trace)
    assert [record.replica for record in sticky.records] == [n % 2 for n in range(20)]
    spread = Simulator(make_scheduler, router=FewestQueuedTokens(), num_replicas=2).run(trace)
    assert {record.replica for record in spread.records} == {0, 1}


class Backlog:
    """A policy that wants a replica for every thousand tokens that wait, up to three."""

    def __init__(self) -> None:
        self.states = []

    def target(self, replicas, state) -> int:
        self.states.append(state)
        assert all(load.pages_used <= load.pages_total for load in replicas.values())
        tokens = sum(load.queued_prefill_tokens for load in replicas.values())
        return min(3, -(-tokens // 1000) + state.num_unrouted)


@pytest.mark.parametrize("num_replicas", [0, 1])
def test_replicas_come_and_go(num_replicas):
    policy = Backlog()
    trace = [TraceRequest(5.0, 20_000, 400) for _ in range(6)] + [TraceRequest(200.0, 100, 5)]
    replay = Simulator(
        make_scheduler, policy=policy, num_replicas=num_replicas, start_s=3.0, interval_s=1.0
    ).run(trace)
    numbers = [number for _, number in replay.num_replicas]
    assert max(numbers) == 3 and 0 in numbers
    # Nobody is lost: neither who came when there was no replica, nor who runs on one that goes.
    assert all(record.end_s is not None for record in replay.records)
    assert replay.records[-1].ttft_s is not None and replay.records[-1].ttft_s > 3.0
    assert any(state.num_starting for state in policy.states)
    ends = max(record.end_s or 0.0 for record in replay.records)
    assert 0.0 < replay.replica_seconds < ends


def test_a_trace_replays_alike():
    trace = short_prompts(30, 3.0)
    once, again = (Simulator(make_scheduler, num_replicas=2).run(trace) for _ in range(2))
    assert once == again
