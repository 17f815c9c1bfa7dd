"""StreamingLLM: the first tokens, the attention sinks, and the last ones (arXiv 2309.17453)."""

import torch
from torch import Tensor

from nsa_platform.config.model import ModelConfig
from nsa_platform.evaluate.baselines.policy import Piece, Policy, grouped_scores
from nsa_platform.model.rotary import rotation_of


class StreamingLlm(Policy):
    """`sinks` first tokens and `recent` last ones, the query's own included.

    Positions are those inside the cache, 0 to sinks + recent - 1, as published (section 3.2): keys
    are kept before rotation, the recent ones lie as far from the query as they are, and the sinks
    directly before them. The rule holds for every query, also of the prompt, as in the perplexity
    runs of github.com/mit-han-lab/streaming-llm; there s = 4, and r = 512 or 2000.
    """

    sparse_in = ("prefill", "decode")

    def __init__(self, config: ModelConfig, *, sinks: int, recent: int) -> None:
        super().__init__(config)
        self.sinks, self.recent = sinks, recent

    def scores(self, piece: Piece) -> Tensor:
        scores = super().scores(piece)
        sinks = min(self.sinks, scores.shape[2])
        # Rotation counts by distance alone: only sinks beyond the recent tokens are moved.
        places = piece.positions.clamp(max=self.sinks + self.recent - 1)
        rotation = rotation_of(places, self.config, dtype=piece.q.dtype)
        moved = grouped_scores(rotation.apply(piece.q_raw), piece.kept.k[:sinks], self.scale)
        is_ahead = piece.distance[..., :sinks] < 0
        scores[..., :sinks] = moved.masked_fill(is_ahead, -torch.inf)
        return scores

    def allowed(self, piece: Piece, scores: Tensor) -> Tensor:
        return (piece.keys < self.sinks) | (piece.distance < self.recent)
