"""MInference: each head reads the prompt by a pattern of its own (arXiv 2407.02490)."""

import torch
from torch import Tensor

from nsa_platform.config.model import ModelConfig
from nsa_platform.evaluate.baselines.patterns import (
    AShape,
    BlockSparse,
    Grain,
    HeadMap,
    Pattern,
    Patterns,
    head_maps,
)
from nsa_platform.evaluate.baselines.policy import Piece, Policy


class MInference(Policy):
    """Each head reads the prompt by its pattern; decoding is dense.

    Which lines and blocks a prompt's queries read is worked out from the whole prompt, for lines
    from its end. `nsa_platform.evaluate.baselines.pattern_search` finds the patterns.

    Source: github.com/microsoft/MInference, minference/modules/minference_forward.py.
    """

    sparse_in = ("prefill",)

    def __init__(self, config: ModelConfig, patterns: Patterns, grain: Grain) -> None:
        super().__init__(config)
        self.patterns, self.grain = patterns, grain
        self._maps: dict[int, list[HeadMap]] = {}
        """Of the layer that reads its prompt now."""

    def prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._maps[layer] = head_maps(q, k, self.config, self.grain)
        out = super().prefill(layer, q, k, v)
        del self._maps[layer]
        return out

    def allowed(self, piece: Piece, scores: Tensor) -> Tensor:
        of_heads = zip(self._maps[piece.layer], self.patterns[piece.layer], strict=True)
        keys = len(piece.keys)
        return torch.stack(
            [head.allowed(pattern, piece.positions)[:, :keys] for head, pattern in of_heads], dim=1
        )

    def index_bytes(self, piece: Piece) -> int:
        """All keys of a group, once, if one of its heads looks for lines or blocks; the mean keys
        of blocks once more."""
        if int(piece.positions[0]) > 0:
            return 0
        kept = self.kept[piece.layer].k
        tokens, groups, width = kept.shape
        share = self.config.attention.query_heads // groups
        heads = self.patterns[piece.layer]
        rows = 0
        for group in range(groups):
            own = heads[group * share : (group + 1) * share]
            rows += tokens * any(not isinstance(pattern, AShape) for pattern in own)
            blocks = -(-tokens // self.grain.tile)
            rows += blocks * any(isinstance(pattern, BlockSparse) for pattern in own)
        return rows * width * kept.element_size()


def everywhere(config: ModelConfig, pattern: Pattern) -> Patterns:
    """The same pattern for every head of every layer."""
    return [[pattern] * config.attention.query_heads] * config.layers
