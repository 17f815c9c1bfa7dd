"""Replays a trace of requests under an autoscaling policy, in the simulator: no Ray, no GPU.

Both kinds of policy get the same delays and bounds, as Ray Serve applies them around any policy.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from deployments.autoscaling import PressurePolicy
from deployments.autoscaling import ReplicaLoad as Pressure
from nsa_platform.serve.pages import PageBook
from nsa_platform.serve.scheduler import Limits, Scheduler
from nsa_platform.serve.simulator import (
    Replay,
    ReplicaLoad,
    ScalingState,
    Simulator,
    TraceRequest,
)
from nsa_platform.serve.step_cost import CostModel

# Of the order of a model of a billion parameters on one GPU: 20 ms of launches, 50,000 prompt
# tokens a second at the beginning of a context, fewer further on.
COST = (0.02, 0.0, 2e-5, 8e-11, 2e-4, 1e-9)
INTERVAL_S = 5.0
"""Between two decisions."""
START_S = 40.0
"""Until a new replica answers."""

Decide = Callable[[Mapping[int, ReplicaLoad], ScalingState], float]


@dataclass(slots=True)
class Delayed:
    """A policy with Ray Serve's delays and bounds: a wish must last before it is followed."""

    decide: Decide
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 120.0
    max_replicas: int = 8
    _wish: int = field(default=0, init=False)
    """1: more, -1: fewer, 0: neither, since _since_s."""
    _since_s: float = field(default=0.0, init=False)

    def target(self, replicas: Mapping[int, ReplicaLoad], state: ScalingState) -> int:
        """How many replicas there should be, at least one."""
        desired = min(self.max_replicas, max(1, math.ceil(self.decide(replicas, state))))
        wish = (desired > state.num_target) - (desired < state.num_target)
        if wish != self._wish:
            self._wish, self._since_s = wish, state.now_s
        delay_s = self.upscale_delay_s if wish > 0 else self.downscale_delay_s
        if wish and state.now_s - self._since_s >= delay_s:
            self._wish = 0
            return desired
        return state.num_target


def by_requests(target_ongoing_requests: float, look_back_s: float = 30.0) -> Decide:
    """Ray Serve's own policy: open requests, averaged over a while, over a target for each."""
    seen: deque[int] = deque(maxlen=max(1, round(look_back_s / INTERVAL_S)))

    def decide(replicas: Mapping[int, ReplicaLoad], state: ScalingState) -> float:
        here = sum(load.num_running + load.num_waiting for load in replicas.values())
        seen.append(here + state.num_unrouted)
        return sum(seen) / len(seen) / target_ongoing_requests

    return decide


def by_pressure(policy: PressurePolicy) -> Decide:
    """Ours."""

    def decide(replicas: Mapping[int, ReplicaLoad], state: ScalingState) -> float:
        loads = [
            Pressure(
                kv_cache_usage=load.pages_used / load.pages_total,
                queued_prefill_tokens=load.queued_prefill_tokens,
                predicted_ttft_s=load.predicted_ttft_s,
                num_requests=load.num_running + load.num_waiting,
            )
            for load in replicas.values()
        ]
        return policy.desired(loads, current=state.num_target, num_waiting=state.num_unrouted)

    return decide


def mixed_trace(seconds: float, *, phase_s: float, seed: int = 0) -> list[TraceRequest]:
    """Phases of many short chats and of few long documents in turn, each a Poisson process."""
    chance = random.Random(seed)
    trace: list[TraceRequest] = []
    now_s = 0.0
    while True:
        is_chat = int(now_s / phase_s) % 2 == 0
        now_s += chance.expovariate(5.0 if is_chat else 0.6)
        if now_s > seconds:
            return trace
        length = chance.lognormvariate(6.7, 0.5) if is_chat else chance.uniform(8e4, 2.5e5)
        trace.append(TraceRequest(now_s, max(16, int(length)), 150 if is_chat else 40))


def replay(trace: Sequence[TraceRequest], decide: Decide) -> Replay:
    """What becomes of a trace that begins with one replica."""
    simulator = Simulator(
        _scheduler, policy=Delayed(decide), start_s=START_S, interval_s=INTERVAL_S
    )
    return simulator.run(trace)


def violations(result: Replay) -> int:
    """Requests that were refused, or whose first token came later than 5 s and 1 s more for every
    10,000 tokens of the prompt."""
    return sum(
        record.ttft_s is None or record.ttft_s > 5 + record.request.num_prompt_tokens / 1e4
        for record in result.records
    )


def _scheduler() -> Scheduler:
    book = PageBook(
        page_size=64,
        num_pages=12_000,
        tail_tokens=512,
        num_window_pages=4000,
        enable_prefix_caching=True,
        lookahead=16,
    )
    limits = Limits(max_num_seqs=32, max_step_tokens=8192, max_step_s=0.05)
    return Scheduler(book, limits, CostModel(COST))
