"""Exact-Top: the keys with the largest true scores, an oracle (arXiv 2502.11089, section 4.2)."""

import torch
from torch import Tensor

from nsa_platform.config.model import ModelConfig
from nsa_platform.evaluate.baselines.policy import Piece, Policy, largest


class ExactTop(Policy):
    """`top` keys of each query head by its scores, beside `leading` first and `local` last ones.

    It reads every key to choose: an upper bound of what a choice of so many keys can do, not a
    method. The paper does not say whether heads of a group choose together; here each for itself.
    """

    sparse_in = ("prefill", "decode")

    def __init__(self, config: ModelConfig, *, top: int, leading: int = 0, local: int = 0) -> None:
        super().__init__(config)
        self.top, self.leading, self.local = top, leading, local

    def allowed(self, piece: Piece, scores: Tensor) -> Tensor:
        forced = (piece.keys < self.leading) | (piece.distance < self.local)
        return forced | largest(scores.masked_fill(forced, -torch.inf), self.top)

    def index_bytes(self, piece: Piece) -> int:
        visible = int(piece.positions.sum()) + len(piece.positions)
        return visible * piece.kept.k[0].numel() * piece.kept.k.element_size()
