"""MInference: vertical and slash lines of the prompt's attention map (arXiv 2407.02490)."""

import torch
from torch import Tensor

from nsa_platform.config.model import ModelConfig
from nsa_platform.evaluate.baselines.policy import Piece, Policy, grouped_scores, largest
from nsa_platform.model.rotary import rotation_of

LAST_QUERIES = 64


class MInference(Policy):
    """Each head reads `vertical` columns and `slash` diagonals of its map; decoding is dense.

    The lines are those with the largest sums of attention weights of the last 64 queries of the
    prompt; the `leading` first columns and the `local` diagonals next to the query are forced, 30
    each as published; of equals the column further left and the diagonal nearer. Which lines a
    prompt's queries read so depends on its end. Every head is vertical-slash, with the (1000, 6096)
    that the published code takes for heads without a searched pattern; the offline search per head
    between this, A-shape and block-sparse is not done.

    Source: github.com/microsoft/MInference, minference/modules/minference_forward.py.
    """

    sparse_in = ("prefill",)

    def __init__(
        self,
        config: ModelConfig,
        *,
        vertical: int,
        slash: int,
        leading: int = 30,
        local: int = 30,
    ) -> None:
        super().__init__(config)
        self.vertical, self.slash, self.leading, self.local = vertical, slash, leading, local
        self._lines: dict[int, tuple[Tensor, Tensor]] = {}
        """Columns bool [H, T] and distances bool [H, T] of each layer's prompt."""

    def prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._lines[layer] = self._find_lines(q, k)
        return super().prefill(layer, q, k, v)

    def allowed(self, piece: Piece, scores: Tensor) -> Tensor:
        columns, distances = self._lines[piece.layer]
        slash = distances[:, piece.distance[:, 0].clamp(min=0)]  # [H, t, S]
        return columns[:, : len(piece.keys)] | slash.transpose(0, 1)

    def index_bytes(self, piece: Piece) -> int:
        """All keys, once for the prompt's last queries."""
        if int(piece.positions[0]) > 0:
            return 0
        tokens = len(self.kept[piece.layer].k)
        return tokens * piece.kept.k[0].numel() * piece.kept.k.element_size()

    def _find_lines(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        tokens = len(q)
        last = torch.arange(max(0, tokens - LAST_QUERIES), tokens, device=q.device)
        places = torch.arange(tokens, device=q.device)
        scores = grouped_scores(self._turn(q[last], last), self._turn(k, places)) * self.scale
        distance = last[:, None] - places  # [t, T]
        weights = scores.masked_fill((distance < 0)[:, None], -torch.inf).softmax(-1)
        columns = weights.sum(0)  # [H, T]
        index = distance.clamp(min=0)[:, None].expand_as(weights).transpose(0, 1).flatten(1)
        diagonals = torch.zeros_like(columns)
        diagonals.scatter_add_(1, index, weights.transpose(0, 1).flatten(1))
        columns[:, : self.leading] = torch.inf
        diagonals[:, : self.local] = torch.inf
        return largest(columns, self.vertical), largest(diagonals, self.slash)

    def _turn(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotation_of(positions, self.config, dtype=x.dtype).apply(x)
