"""MInference's offline search: which pattern each head reads by, on one sample, at equal FLOPs.

Every head is offered an A-shape, vertical-slash in several ratios of columns to diagonals, and
block-sparse. Sizes are changed until a kernel would read as much as the A-shape does on the
sample, in tiles where it reads tiles; the pattern whose output differs least from that of full
attention wins, of equals the first.

Source: arXiv 2407.02490, section 3.2 and algorithm 1; there the A-shape has 1,024 leading and 4,096
local tokens, and the sample is key-value retrieval of 30,000 tokens. The difference is the sum of
absolute differences of the outputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from nsa_platform.config.evaluate import PatternSearchConfig
from nsa_platform.config.model import ModelConfig
from nsa_platform.evaluate.baselines.budget import Budget
from nsa_platform.evaluate.baselines.full import Full
from nsa_platform.evaluate.baselines.minference import MInference
from nsa_platform.evaluate.baselines.patterns import (
    AShape,
    BlockSparse,
    Grain,
    HeadMap,
    Pattern,
    VerticalSlash,
    head_maps,
)
from nsa_platform.evaluate.baselines.policy import SCORES_PER_PIECE
from nsa_platform.evaluate.tasks.fitting import largest
from nsa_platform.model.inputs import PolicyInputs
from nsa_platform.model.transformer import Transformer

PAPER_TARGET = AShape(1024, 4096)
PAPER_TILE = 64


@dataclass(frozen=True, slots=True)
class Found:
    """A head's best pattern on the sample."""

    pattern: Pattern
    share: float
    """Of the pairs of a query and a key that full attention reads."""
    error: float
    """Mean absolute difference of the head's output."""


@dataclass(frozen=True, slots=True)
class Space:
    """What the heads are offered."""

    target: AShape
    """The first pattern; all others may read as much as it does."""
    vertical_slash: Sequence[VerticalSlash]
    """Ratios of columns to diagonals."""
    grain: Grain

    @property
    def starts(self) -> tuple[VerticalSlash | BlockSparse, ...]:
        return (*self.vertical_slash, BlockSparse(1))


def search_space(config: PatternSearchConfig, budget: Budget | None) -> Space:
    """The space of a budget, or the published one."""
    ratios = [VerticalSlash(*each) for each in config.vertical_slash]
    if budget is None:
        return Space(PAPER_TARGET, ratios, Grain(PAPER_TILE))
    target = AShape(budget.leading, budget.local + budget.dynamic)
    return Space(target, ratios, Grain(budget.scaled(PAPER_TILE), budget.leading, budget.local))


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search has found, for every head of every layer."""

    heads: Sequence[Sequence[Found]]
    grain: Grain
    budget: Budget | None
    """At which it was made; None: the published one."""

    def policy(self, config: ModelConfig, budget: Budget | None) -> MInference:
        """MInference with these patterns; at another budget their sizes grow in its ratio."""
        factor, grain = 1.0, self.grain
        if budget is not None and self.budget is not None:
            factor = budget.total / self.budget.total
            grain = Grain(grain.tile, budget.leading, budget.local)
        patterns = [[found.pattern.scaled(factor) for found in layer] for layer in self.heads]
        return MInference(config, patterns, grain)


class PatternSearch(Full):
    """Full attention of one prompt, on which every head tries the patterns of a space."""

    def __init__(
        self, config: ModelConfig, space: Space, advance: Callable[[], None] = lambda: None
    ) -> None:
        """advance: called when a head's pattern is found."""
        super().__init__(config)
        self.space, self.advance = space, advance
        self.heads: list[list[Found]] = []

    def prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        share = q.shape[1] // k.shape[1]
        maps = head_maps(q, k, self.config, self.space.grain)
        self.heads.append([])
        for number, head in enumerate(maps):
            self.heads[-1].append(self._best(head, v[:, number // share]))
            self.advance()
        return super().prefill(layer, q, k, v)

    def _best(self, head: HeadMap, v: Tensor) -> Found:
        tokens, target = len(head.places), head.pairs(self.space.target)
        offered: list[Pattern] = [self.space.target]
        for start in self.space.starts:
            read = cache(lambda size, start=start: head.pairs(start.sized(size)))
            offered.append(start.sized(largest(read, target, 1, tokens)))
        errors = output_errors(head, v, offered)
        best = errors.index(min(errors))
        everything = tokens * (tokens + 1) // 2
        return Found(offered[best], head.pairs(offered[best]) / everything, errors[best])


def output_errors(head: HeadMap, v: Tensor, patterns: Sequence[Pattern]) -> list[float]:
    """Mean absolute difference of a head's output from full attention, for each pattern."""
    v = v.to(head.q.dtype)
    sums = torch.zeros(len(patterns), dtype=torch.float64, device=v.device)
    for queries in head.places.split(max(1, SCORES_PER_PIECE // len(v))):
        ahead = queries[:, None] < head.places
        scores = (head.q[queries] @ head.k.T * head.scale).masked_fill(ahead, -torch.inf)
        exact = scores.softmax(-1) @ v
        for number, pattern in enumerate(patterns):
            weights = scores.masked_fill(~head.allowed(pattern, queries), -torch.inf).softmax(-1)
            sums[number] += (weights @ v - exact).abs().sum(dtype=torch.float64)
    return (sums / v.numel()).tolist()


@torch.no_grad()
def search_patterns(
    model: Transformer,
    sample: Sequence[int],
    config: PatternSearchConfig,
    budget: Budget | None,
    *,
    advance: Callable[[], None] = lambda: None,
) -> Searched:
    """The patterns of a model with full attention on one sample; budget None: the published.

    advance: as PatternSearch has it.
    """
    space = search_space(config, budget)
    search = PatternSearch(model.config, space, advance)
    ids = torch.tensor(sample, device=model.embedding.weight.device)
    model(ids, PolicyInputs(search.prefill))
    return Searched(search.heads, space.grain, budget)
