"""Mixture of Block Attention: each head reads its top-k blocks, chosen by their mean keys.

Source: arXiv 2502.13189, section 2.2. It is NSA's selected branch alone, where blocks are scored by
the means of their rotated keys, do not overlap, and are chosen for each query head.
"""

import torch
from torch import Tensor

from nsa_kernels import NsaConfig, compressed_attention, select_blocks, selected_attention
from nsa_platform.config.model import MobaAttentionConfig, ModelConfig
from nsa_platform.model.attention import FullAttention
from nsa_platform.model.compression import compression_blocks, gather_rows


class MobaAttention(FullAttention):
    """The projections of full attention; whole sequences read chosen blocks. It has no cache."""

    def __init__(
        self, config: ModelConfig, attention: MobaAttentionConfig, *, layer_index: int
    ) -> None:
        super().__init__(config, attention, layer_index=layer_index)
        block = attention.selection_block_size
        self.kernel_config = NsaConfig(
            compression_block_size=block,
            compression_stride=block,
            selection_block_size=block,
            num_selected_blocks=attention.num_selected_blocks,
            num_initial_blocks=0,
            num_local_blocks=1,
        )

    def _attend_rotated(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Out [T, H, V]. The choice has no gradient: keys learn in the blocks that are read."""
        heads_per_group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(heads_per_group, 1) for x in (k, v))
        sizes = {"config": self.kernel_config, "cu_seqlens": cu_seqlens, "scale": self.scale}
        with torch.no_grad():
            means = mean_keys(k, cu_seqlens, self.kernel_config)
            _, lse = compressed_attention(q, means, means, **sizes)
            blocks = select_blocks(q, means, lse, **sizes)
        return selected_attention(q, k, v, blocks, **sizes)[0]


def mean_keys(k: Tensor, cu_seqlens: Tensor, config: NsaConfig) -> Tensor:
    """[C, H, K]: the mean of the keys [T, H, K] of each complete block of packed sequences."""
    blocks = compression_blocks(cu_seqlens, num_tokens=len(k), config=config)
    mean = gather_rows(k.transpose(0, 1), blocks.tokens).float().mean(2)
    return mean.transpose(0, 1).to(k.dtype).contiguous()
