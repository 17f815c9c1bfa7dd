"""The frame of a policy: keep keys and values, let each query read some of them, count.

A policy serves one sequence. Its prefill takes the prompt, at once and at most once; its decode
takes further tokens, and any number together gives what one by one gives. Both have the shape of
nsa_platform.model.inputs.Attend. The frame goes over the queries in pieces and holds the scores of
a piece with all keys, so that any rule is a mask: this measures what a rule does to quality and
what it reads, not how fast a kernel for it is.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nsa_platform.config.model import ModelConfig
from nsa_platform.evaluate.baselines.reads import Reads
from nsa_platform.model.rotary import attention_scale, rotation_of

Phase = Literal["prefill", "decode"]

# Scores of one piece take 256 MB in float32.
SCORES_PER_PIECE = 1 << 26


@dataclass(slots=True)
class Kept:
    """Keys and values of the tokens that one layer has seen, S of them."""

    k_raw: Tensor
    """[S, G, K], before rotation."""
    k: Tensor
    """[S, G, K], rotated to the tokens' own positions."""
    v: Tensor
    """[S, G, V]"""

    def add(self, other: "Kept") -> None:
        self.k_raw = torch.cat([self.k_raw, other.k_raw])
        self.k = torch.cat([self.k, other.k])
        self.v = torch.cat([self.v, other.v])

    def first(self, count: int) -> "Kept":
        return Kept(self.k_raw[:count], self.k[:count], self.v[:count])


@dataclass(frozen=True, slots=True)
class Piece:
    """Some queries of one layer, one after the other, and all keys up to the last of them."""

    layer: int
    phase: Phase
    q_raw: Tensor
    """[t, H, K], before rotation."""
    q: Tensor
    """[t, H, K], rotated to the queries' own positions."""
    positions: Tensor
    """int64 [t]"""
    kept: Kept

    @property
    def keys(self) -> Tensor:
        """int64 [S], positions of the keys."""
        return torch.arange(len(self.kept.k), device=self.positions.device)

    @property
    def distance(self) -> Tensor:
        """int64 [t, 1, S], how far each key lies behind each query; below 0: ahead of it."""
        return (self.positions[:, None] - self.keys)[:, None]


class Policy(ABC):
    """Attention of one sequence by a rule of which keys a query reads."""

    sparse_in: ClassVar[tuple[Phase, ...]]
    """Phases in which the rule holds; in the other one attention is dense."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.scale = attention_scale(config)
        self.reads: dict[Phase, Reads] = {"prefill": Reads(), "decode": Reads()}
        self.kept: dict[int, Kept] = {}

    def prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend the prompt: [T, H, K], [T, G, K], [T, G, V] -> [T, H, V]."""
        assert layer not in self.kept, "a policy takes one prompt"
        return self._attend("prefill", layer, q, k, v)

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend further tokens, each as if it came alone: shapes as in prefill."""
        return self._attend("decode", layer, q, k, v)

    @abstractmethod
    def allowed(self, piece: Piece, scores: Tensor) -> Tensor:
        """Which keys the queries read, bool [t, H or 1, S]; those ahead of a query do not count.

        scores: [t, H, S], scaled, with every key.
        """

    def scores(self, piece: Piece) -> Tensor:
        """Scaled scores of all keys [t, H, S]; those ahead of a query are -inf."""
        dots = grouped_scores(piece.q, piece.kept.k, self.scale)
        # Of a piece's keys only the last ones, its own, lie ahead of a query of it.
        own = slice(dots.shape[2] - len(dots), None)
        dots[..., own].masked_fill_(piece.distance[..., own] < 0, -torch.inf)
        return dots

    def observe(self, piece: Piece, weights: Tensor) -> None:  # noqa: B027
        """Learn from the attention weights [t, H, S] of a piece; most rules do not."""

    def index_bytes(self, piece: Piece) -> int:
        """Bytes that the choice looks at for a piece, beside the keys and values it chooses."""
        return 0

    def piece_length(self, phase: Phase, num_keys: int) -> int:
        """Queries of one piece."""
        return max(1, SCORES_PER_PIECE // (self.config.attention.query_heads * num_keys))

    def _attend(self, phase: Phase, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        begin = len(self.kept[layer].k) if layer in self.kept else 0
        positions = torch.arange(begin, begin + len(q), device=q.device)
        rotation = rotation_of(positions, self.config, dtype=q.dtype)
        new = Kept(k, rotation.apply(k), v)
        if layer in self.kept:
            self.kept[layer].add(new)
        else:
            self.kept[layer] = new
        rotated = rotation.apply(q)
        length = self.piece_length(phase, begin + len(q))
        outs = []
        for first in range(0, len(q), length):
            rows = slice(first, min(first + length, len(q)))
            seen = self.kept[layer].first(begin + rows.stop)
            piece = Piece(layer, phase, q[rows], rotated[rows], positions[rows], seen)
            outs.append(self._read(piece))
        return torch.cat(outs)

    def _read(self, piece: Piece) -> Tensor:
        """Out [t, H, V] of a piece, with its reads counted."""
        scores = self.scores(piece)
        allowed = piece.distance >= 0
        if piece.phase in self.sparse_in:
            allowed = allowed & self.allowed(piece, scores)
        allowed = allowed.expand_as(scores)
        weights = scores.masked_fill_(~allowed, -torch.inf).softmax(-1)
        self.observe(piece, weights)
        kept = piece.kept
        self.reads[piece.phase].add(
            piece.layer,
            allowed,
            groups=kept.k.shape[1],
            row_bytes=(kept.k.shape[2] + kept.v.shape[2]) * kept.k.element_size(),
            index_bytes=self.index_bytes(piece) if piece.phase in self.sparse_in else 0,
        )
        by_group = weights.unflatten(1, (kept.v.shape[1], -1))
        out = torch.einsum("tgrs,sgv->tgrv", by_group, kept.v.to(weights.dtype))
        return out.flatten(1, 2).to(kept.v.dtype)


def grouped_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled dot products [t, H, S] of q [t, H, K] with k [S, G, K], in fp32 or better."""
    exact = torch.promote_types(q.dtype, torch.float32)
    by_group = (q.to(exact) * scale).unflatten(1, (k.shape[1], -1))
    return torch.einsum("tgrk,sgk->tgrs", by_group, k.to(exact)).flatten(1, 2)


def largest(values: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest values on the last axis; of equals the first; never -inf."""
    if count < 1:
        return torch.zeros_like(values, dtype=torch.bool)
    if count >= values.shape[-1]:
        return values > -torch.inf
    least = values.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, level = values > least, values == least
    missing = count - above.sum(-1, keepdim=True)
    return (above | (level & (level.cumsum(-1) <= missing))) & (values > -torch.inf)
