"""How many replicas a model needs: by pages in use, prompts in line and the wait for a first token.

Counting requests says nothing when one of them is a thousand times as long as another. This file
imports nothing of ours: Ray Serve's controller, which has no code of ours, runs what is in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.serve.config import AutoscalingContext


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What one replica reports, averaged over the look-back period."""

    kv_cache_usage: float
    """Share of its pages in use, 0 to 1."""
    queued_prefill_tokens: float
    """Prompt tokens that it has taken and not yet computed."""
    predicted_ttft_s: float
    """When the first token of an average request would come if it came now."""
    num_requests: float
    """Requests that it runs or holds."""


class PressurePolicy:
    """The number of replicas at which pages, prompts in line and waits are on target.

    Grows as soon as more are needed. Shrinks only to a number at which the load would fill at most
    `shrink_at` of the target, so that a load on the border does not swing the number to and fro.
    """

    def __init__(
        self,
        *,
        target_kv_usage: float = 0.8,
        target_queued_tokens: float = 32_768.0,
        target_ttft_s: float = 4.0,
        shrink_at: float = 0.8,
        max_growth: float = 2.0,
    ) -> None:
        """
        Args:
            target_kv_usage: share of its pages that a replica should have in use, in (0, 1].
            target_queued_tokens: prompt tokens that a replica should have in line: what it computes
                in about as long as a prompt may wait.
            target_ttft_s: seconds that an average request should wait for its first token.
            shrink_at: share of the target to which fewer replicas may be filled, in (0, 1).
            max_growth: how many times as many replicas one decision may ask for, above 1.

        Raises:
            ValueError: a value is out of range.
        """
        for name, value, holds, rule in (
            ("target_kv_usage", target_kv_usage, 0 < target_kv_usage <= 1, "lie in (0, 1]"),
            (
                "target_queued_tokens",
                target_queued_tokens,
                target_queued_tokens > 0,
                "be positive",
            ),
            ("target_ttft_s", target_ttft_s, target_ttft_s > 0, "be positive"),
            ("shrink_at", shrink_at, 0 < shrink_at < 1, "lie in (0, 1)"),
            ("max_growth", max_growth, max_growth > 1, "be above 1"),
        ):
            if not holds:
                raise ValueError(f"{name}={value} must {rule}")
        self.target_kv_usage = target_kv_usage
        self.target_queued_tokens = target_queued_tokens
        self.target_ttft_s = target_ttft_s
        self.shrink_at = shrink_at
        self.max_growth = max_growth

    def desired(self, loads: Sequence[ReplicaLoad], *, current: int, num_waiting: float) -> int:
        """Replicas that are wanted, 0 if nobody asks.

        Args:
            loads: of the replicas that run.
            current: replicas that there are or are being started.
            num_waiting: requests in front of all replicas, which none of them reports.
        """
        num_here = sum(load.num_requests for load in loads)
        if num_here + num_waiting == 0:
            return 0
        if not loads:
            return max(1, current)
        needed = self._needed(loads)
        if num_waiting:
            # Each weighs as much as one that is here: there is no place for it as things are.
            needed *= 1 + num_waiting / max(1.0, num_here)
            needed = max(needed, len(loads) * min(self.max_growth, 1 + num_waiting))
        if needed > current:
            return max(current + 1, math.ceil(min(needed, self.max_growth * max(1, current))))
        return max(1, min(current, math.ceil(needed / self.shrink_at)))

    def _needed(self, loads: Sequence[ReplicaLoad]) -> float:
        """Replicas over which the load, spread evenly, is on target."""
        pages = sum(load.kv_cache_usage for load in loads) / self.target_kv_usage
        queued = sum(load.queued_prefill_tokens for load in loads) / self.target_queued_tokens
        waits = sum(load.predicted_ttft_s for load in loads) / self.target_ttft_s
        return max(pages, queued, waits)


class KvPressurePolicy:
    """PressurePolicy for Ray Serve; its arguments are `policy_kwargs`.

    Bounds, delays and factors are those of the deployment's autoscaling_config, which Ray applies.
    """

    def __init__(self, **settings: float) -> None:
        self._policy = PressurePolicy(**settings)

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The wanted number of replicas, and no state."""
        reported = ctx.aggregated_metrics or {}
        loads = [
            ReplicaLoad(**{name: reported[name][replica] for name in ReplicaLoad.__slots__})
            for replica in ctx.running_replicas
            if all(replica in reported.get(name, ()) for name in ReplicaLoad.__slots__)
        ]
        desired = self._policy.desired(
            loads, current=ctx.target_num_replicas, num_waiting=ctx.total_queued_requests or 0
        )
        return desired, {}
