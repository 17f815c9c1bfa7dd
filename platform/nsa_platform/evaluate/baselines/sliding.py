"""Sliding window: a query reads the last tokens, its own included, and nothing else."""

from torch import Tensor

from nsa_platform.config.model import ModelConfig
from nsa_platform.evaluate.baselines.policy import Piece, Policy


class SlidingWindow(Policy):
    """The last `window` tokens, as in arXiv 2004.05150 (Longformer) without its global tokens."""

    sparse_in = ("prefill", "decode")

    def __init__(self, config: ModelConfig, *, window: int) -> None:
        super().__init__(config)
        self.window = window

    def allowed(self, piece: Piece, scores: Tensor) -> Tensor:
        return piece.distance < self.window
