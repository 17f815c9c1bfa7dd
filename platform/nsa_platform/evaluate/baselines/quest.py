"""Quest: pages whose channelwise bounds promise the largest score (arXiv 2406.10774)."""

import torch
from torch import Tensor
from torch.nn import functional

from nsa_platform.config.model import ModelConfig
from nsa_platform.evaluate.baselines.policy import Piece, Policy, largest


class Quest(Policy):
    """`pages` pages of each query head, by the bound sum_i max(q_i min_i, q_i max_i) of a page.

    The prompt is dense, and so are the first `dense_layers` layers. Keys are rotated. A page's
    bounds are those of its tokens so far; the query's own page competes like any other. `leading`
    first and `local` last tokens come beside the pages when they are not 0; pages that lie in them
    wholly do not compete.

    Source: github.com/mit-han-lab/Quest, evaluation/quest_attention.py; there pages of 16 tokens,
    max(3, budget / 16) of them, two dense layers. Its CUDA kernels force the last page instead.
    """

    sparse_in = ("decode",)

    def __init__(
        self,
        config: ModelConfig,
        *,
        page: int,
        pages: int,
        dense_layers: int,
        leading: int = 0,
        local: int = 0,
    ) -> None:
        super().__init__(config)
        self.page, self.pages, self.dense_layers = page, pages, dense_layers
        self.leading, self.local = leading, local

    def allowed(self, piece: Piece, scores: Tensor) -> Tensor:
        if piece.layer < self.dense_layers:
            return piece.distance >= 0
        forced = (piece.keys < self.leading) | (piece.distance < self.local)  # [t, 1, S]
        lack = -len(piece.keys) % self.page
        free = functional.pad(~forced & (piece.distance >= 0), (0, lack))
        competes = free.unflatten(2, (-1, self.page)).any(3)  # [t, 1, pages]
        bounds = self._bounds(piece).masked_fill(~competes, -torch.inf)
        chosen = largest(bounds, self.pages).repeat_interleave(self.page, dim=2)
        return forced | chosen[..., : len(piece.keys)]

    def index_bytes(self, piece: Piece) -> int:
        """Two bounds for each page."""
        if piece.layer < self.dense_layers:
            return 0
        pages = int((piece.positions // self.page + 1).sum())
        return 2 * pages * piece.kept.k[0].numel() * piece.kept.k.element_size()

    def _bounds(self, piece: Piece) -> Tensor:
        """[t, H, pages], of each page's tokens up to the query; of pages ahead anything."""
        exact = torch.promote_types(piece.q.dtype, torch.float32)
        keys = piece.kept.k.to(exact)
        lack = -len(keys) % self.page
        low = functional.pad(keys, (0, 0, 0, 0, 0, lack), value=torch.inf)
        high = functional.pad(keys, (0, 0, 0, 0, 0, lack), value=-torch.inf)
        low = low.unflatten(0, (-1, self.page)).cummin(1).values  # [pages, page, G, K]
        high = high.unflatten(0, (-1, self.page)).cummax(1).values
        q = piece.q.to(exact).unflatten(1, (keys.shape[1], -1))
        above, below = q.clamp(min=0), q.clamp(max=0)
        bounds = torch.einsum("tgrk,pgk->tgrp", above, high[:, -1])
        bounds += torch.einsum("tgrk,pgk->tgrp", below, low[:, -1])
        # The query's own page may have tokens after the query.
        own, last = piece.positions // self.page, piece.positions % self.page
        of_own = torch.einsum("tgrk,tgk->tgr", above, high[own, last])
        of_own += torch.einsum("tgrk,tgk->tgr", below, low[own, last])
        index = own[:, None, None, None].expand(*of_own.shape, 1)
        return bounds.scatter(3, index, of_own[..., None]).flatten(1, 2)
