"""H2O: keep the tokens that drew most attention so far, and the last ones (arXiv 2306.14048)."""

import torch
from torch import Tensor

from nsa_platform.config.model import ModelConfig
from nsa_platform.evaluate.baselines.policy import Phase, Piece, Policy, largest


class H2o(Policy):
    """`heavy` tokens by accumulated attention, `recent` last ones; what is evicted never returns.

    The prompt is dense, and its whole attention map counts. After it and after each decoded token
    every key/value head keeps its `recent` last tokens, its `leading` first ones, and of the rest
    the `heavy` ones with the largest sums of attention weights over all queries so far; of equals
    the earlier. A query so reads one token more than is kept: its own. Positions stay those of the
    text. The published rule is for MHA and has no leading tokens; heads of a group share their
    keys, so that here their sums are added.

    Source: github.com/FMInference/H2O, h2o_hf/utils_hh; there heavy = recent = a tenth of the
    prompt, or 1024.
    """

    sparse_in = ("decode",)

    def __init__(self, config: ModelConfig, *, heavy: int, recent: int, leading: int = 0) -> None:
        super().__init__(config)
        self.heavy, self.recent, self.leading = heavy, recent, leading
        self._sums: dict[int, Tensor] = {}
        """[G, S] of each layer; -inf: evicted."""

    def piece_length(self, phase: Phase, num_keys: int) -> int:
        return 1 if phase == "decode" else super().piece_length(phase, num_keys)

    def allowed(self, piece: Piece, scores: Tensor) -> Tensor:
        if piece.layer not in self._sums:
            return piece.distance >= 0
        groups = piece.kept.k.shape[1]
        own = torch.ones(groups, 1, dtype=torch.bool, device=scores.device)
        alive = torch.cat([self._evict(piece.layer), own], dim=1)  # [G, S]
        return alive.repeat_interleave(scores.shape[1] // groups, dim=0)[None]

    def observe(self, piece: Piece, weights: Tensor) -> None:
        new = weights.unflatten(1, (piece.kept.k.shape[1], -1)).sum((0, 2))  # [G, S]
        known = self._sums.get(piece.layer, new[:, :0])
        new[:, : known.shape[1]] += known
        self._sums[piece.layer] = new

    def index_bytes(self, piece: Piece) -> int:
        """The sums of what is kept, fp32."""
        kept = min(len(piece.kept.k), self.leading + self.heavy + self.recent)
        return 4 * kept * piece.kept.k.shape[1]

    def _evict(self, layer: int) -> Tensor:
        """Drop what is not kept, for good; bool [G, S], what is left."""
        sums = self._sums[layer]
        token = torch.arange(sums.shape[1], device=sums.device)
        forced = (token < self.leading) | (token >= sums.shape[1] - self.recent)
        alive = sums > -torch.inf
        kept = alive & (forced | largest(sums.masked_fill(forced, -torch.inf), self.heavy))
        self._sums[layer] = sums.masked_fill(~kept, -torch.inf)
        return kept
