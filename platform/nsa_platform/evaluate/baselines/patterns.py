"""MInference's patterns of a head (A-shape, vertical-slash, block-sparse) and what they read.

Source: arXiv 2407.02490, sections 2.2 and 3.1, algorithms 2 and 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from nsa_platform.config.model import ModelConfig
from nsa_platform.evaluate.baselines.policy import largest
from nsa_platform.model.rotary import attention_scale, rotation_of

LAST_QUERIES = 64


@dataclass(frozen=True, slots=True)
class AShape:
    """The first tokens of the prompt and the last ones, the query's own included."""

    leading: int
    local: int

    def scaled(self, factor: float) -> "AShape":
        return AShape(_size(self.leading, factor), _size(self.local, factor))


@dataclass(frozen=True, slots=True)
class VerticalSlash:
    """So many columns and diagonals of the attention map."""

    columns: int
    diagonals: int

    def scaled(self, factor: float) -> "VerticalSlash":
        return VerticalSlash(_size(self.columns, factor), _size(self.diagonals, factor))

    def sized(self, lines: int) -> "VerticalSlash":
        """So many lines together, divided in this pattern's ratio."""
        columns = lines * self.columns // (self.columns + self.diagonals)
        return VerticalSlash(columns, lines - columns)


@dataclass(frozen=True, slots=True)
class BlockSparse:
    """So many blocks of keys for each block of queries."""

    blocks: int

    def scaled(self, factor: float) -> "BlockSparse":
        return BlockSparse(_size(self.blocks, factor))

    def sized(self, blocks: int) -> "BlockSparse":
        return BlockSparse(blocks)


Pattern = AShape | VerticalSlash | BlockSparse
Patterns = Sequence[Sequence[Pattern]]
"""Of each head of each layer."""


def _size(size: int, factor: float) -> int:
    return max(1, round(size * factor))


@dataclass(frozen=True, slots=True)
class Grain:
    """What holds for every pattern of a kernel."""

    tile: int = 1
    """Queries that read together: a key on a kept diagonal of one of them is read by all, as in a
    kernel that works in squares of tile x tile. Block-sparse has blocks of this size."""
    leading: int = 30
    """First columns, kept before all others."""
    local: int = 30
    """Diagonals next to the query, kept before all others."""


class HeadMap:
    """One head's attention map of a prompt, and which of it a pattern reads.

    Lines are those with the largest sums of attention weights of the prompt's last 64 queries; of
    equals the column further left and the diagonal nearer. Blocks are those with the largest dot
    products of mean query and mean key, those of the query's own block included; of equals the
    first.
    """

    def __init__(self, q: Tensor, k: Tensor, *, scale: float, grain: Grain) -> None:
        """q [T, K] and k [T, K], rotated, fp32 or better."""
        self.q, self.k, self.scale, self.grain = q, k, scale, grain
        self.places = torch.arange(len(q), device=q.device)
        self._chosen: dict[Pattern, tuple[Tensor, ...]] = {}
        """What a pattern reads of this map, whichever queries read it."""

    def allowed(self, pattern: Pattern, queries: Tensor) -> Tensor:
        """Keys that queries at these positions read, bool [t, T]; those ahead do not count."""
        match pattern:
            case AShape():
                distance = queries[:, None] - self.places
                return (self.places < pattern.leading) | (distance < pattern.local)
            case VerticalSlash():
                return self._on_lines(pattern, queries)
            case BlockSparse():
                tile = self.grain.tile
                if pattern not in self._chosen:
                    self._chosen[pattern] = (largest(self._block_scores, pattern.blocks),)
                return self._chosen[pattern][0][queries // tile][:, self.places // tile]

    def pairs(self, pattern: Pattern) -> int:
        """Pairs of a query and a key that are read: a kernel's FLOPs, but for 2 (K + V)."""
        if isinstance(pattern, AShape):
            return int((self.places + 1).clamp(max=pattern.leading + pattern.local).sum())
        starts = self.places[:: self.grain.tile]
        ends = (starts + self.grain.tile).clamp(max=len(self.places))
        # All queries of a tile read the same, but for the keys ahead of them.
        readers = (ends[:, None] - torch.maximum(starts[:, None], self.places)).clamp(min=0)
        return int((readers * self.allowed(pattern, starts)).sum())

    def _on_lines(self, pattern: VerticalSlash, queries: Tensor) -> Tensor:
        tile = self.grain.tile
        if pattern not in self._chosen:
            self._chosen[pattern] = self._lines(pattern)
        columns, near = self._chosen[pattern]
        offset = (queries // tile * tile)[:, None] - self.places + tile - 1
        return columns | near[offset.clamp(min=0)]

    def _lines(self, pattern: VerticalSlash) -> tuple[Tensor, Tensor]:
        """Columns that are kept, bool [T], and at i whether a diagonal from i - tile + 1 to i is,
        bool [T + tile - 1]."""
        columns, diagonals = self._line_sums
        tile = self.grain.tile
        kept = functional.pad(largest(diagonals, pattern.diagonals).float(), (tile - 1, tile - 1))
        near = functional.max_pool1d(kept[None], tile, stride=1)[0].bool()
        return largest(columns, pattern.columns), near

    @cached_property
    def _line_sums(self) -> tuple[Tensor, Tensor]:
        """Sums of weights by column and by distance, both [T]; forced lines have infinite ones."""
        last = self.places[-LAST_QUERIES:]
        distance = last[:, None] - self.places
        scores = (self.q[last] @ self.k.T * self.scale).masked_fill(distance < 0, -torch.inf)
        weights = scores.softmax(-1)
        columns = weights.sum(0)
        diagonals = torch.zeros_like(columns)
        diagonals.scatter_add_(0, distance.clamp(min=0).flatten(), weights.flatten())
        columns[: self.grain.leading] = torch.inf
        diagonals[: self.grain.local] = torch.inf
        return columns, diagonals

    @cached_property
    def _block_scores(self) -> Tensor:
        """[blocks of queries, blocks of keys]; -inf for blocks ahead."""
        scores = self._block_means(self.q) @ self._block_means(self.k).T
        return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)

    def _block_means(self, x: Tensor) -> Tensor:
        return torch.stack([block.mean(0) for block in x.split(self.grain.tile)])


def head_maps(q: Tensor, k: Tensor, config: ModelConfig, grain: Grain) -> list[HeadMap]:
    """The maps of a layer's heads, from q [T, H, K] and k [T, G, K] of a prompt before rotation."""
    rotation = rotation_of(torch.arange(len(q), device=q.device), config, dtype=q.dtype)
    exact = torch.promote_types(q.dtype, torch.float32)
    q, k = rotation.apply(q).to(exact), rotation.apply(k).to(exact)
    share = q.shape[1] // k.shape[1]
    scale = attention_scale(config)
    return [
        HeadMap(q[:, head], k[:, head // share], scale=scale, grain=grain)
        for head in range(q.shape[1])
    ]
