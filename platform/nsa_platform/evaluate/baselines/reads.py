"""What a policy really reads: keys of a query, their union in a group, bytes of a step."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ReadCount:
    """Means over the layers and queries of one phase; all 0 where there was no query."""

    queries: int
    """Tokens that went through the phase."""
    keys_per_query: float
    """Keys of one query head."""
    union_per_group: float
    """Distinct keys that the query heads of one key/value head read together: what has to be
    loaded. Above keys_per_query where the heads of a group choose apart."""
    bytes_per_step: float
    """Bytes of a token over all layers: the union's keys and values, and what the choice itself
    has to look at (page bounds, block keys, all keys for an oracle)."""


class Reads:
    """Adds up what is read. The sums stay on the device until summary()."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._queries: dict[int, int] = {}

    def add(
        self, layer: int, allowed: Tensor, *, groups: int, row_bytes: int, index_bytes: int
    ) -> None:
        """Count queries of one layer.

        Args:
            allowed: bool [t, H, S], the keys that each query head reads.
            row_bytes: of one key and its value in one group.
            index_bytes: what the choice looked at, for all these queries and groups together.
        """
        union = allowed.unflatten(1, (groups, -1)).any(2)
        counts = torch.stack([allowed.sum(), union.sum(), union.sum() * row_bytes + index_bytes])
        per_head = torch.tensor(
            [1 / allowed.shape[1], 1 / groups, 1.0], dtype=torch.float64, device=allowed.device
        )
        sums = counts.double() * per_head
        self._sums = sums if self._sums is None else self._sums + sums
        self._queries[layer] = self._queries.get(layer, 0) + allowed.shape[0]

    def merge(self, other: "Reads") -> None:
        """Add what another one counted."""
        if other._sums is None:
            return
        self._sums = other._sums if self._sums is None else self._sums + other._sums
        for layer, queries in other._queries.items():
            self._queries[layer] = self._queries.get(layer, 0) + queries

    def summary(self) -> ReadCount:
        """The means. The only place that waits for the device."""
        if self._sums is None:
            return ReadCount(0, 0.0, 0.0, 0.0)
        keys, union, total = self._sums.tolist()
        seen = sum(self._queries.values())
        tokens = max(self._queries.values())
        return ReadCount(tokens, keys / seen, union / seen, total / tokens)
