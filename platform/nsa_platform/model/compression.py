"""phi: folds the l keys (or values) of a compression block into one (Eq. 7).

Blocks start each d tokens and overlap when d < l. Their tokens are gathered by a table that is
made once for a forward pass; the table has the static bound of T // d rows, so that no count ever
travels to the host. Rows beyond the last complete block repeat the first tokens, no query sees
them, and no gradient comes back from them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsa_kernels import NsaConfig, compressed_cu_seqlens
from nsa_platform.config.model import NsaAttentionConfig


def kernel_config(attention: NsaAttentionConfig) -> NsaConfig:
    """The block sizes of an attention config as the kernels' value object."""
    return NsaConfig(
        compression_block_size=attention.compression_block_size,
        compression_stride=attention.compression_stride,
        selection_block_size=attention.selection_block_size,
        num_selected_blocks=attention.num_selected_blocks,
        num_initial_blocks=attention.num_initial_blocks,
        num_local_blocks=attention.num_local_blocks,
        window_size=attention.window_size,
    )


@dataclass(frozen=True, slots=True)
class CompressionBlocks:
    """Which tokens form which compression block, for packed sequences."""

    tokens: Tensor
    """int64 [C, l], packed token of each place of each block."""
    places: Tensor
    """int64 [T, l / d], flat places (block * l + offset) that hold each token; -1 where none."""
    starts: Tensor
    """int64 [C], position in its sequence at which each block starts."""


def compression_blocks(
    cu_seqlens: Tensor, *, num_tokens: int, config: NsaConfig
) -> CompressionBlocks:
    """The blocks of packed sequences; C = max(T // d, 1) rows without asking the device."""
    size, stride = config.compression_block_size, config.compression_stride
    offsets = compressed_cu_seqlens(cu_seqlens, config).long()
    begins = cu_seqlens.long()
    last_sequence = cu_seqlens.numel() - 2

    rows = torch.arange(max(num_tokens // stride, 1), device=cu_seqlens.device)
    sequence = (torch.searchsorted(offsets, rows, right=True) - 1).clamp(0, last_sequence)
    is_block = rows < offsets[-1]
    starts = torch.where(is_block, (rows - offsets[sequence]) * stride, 0)
    first = torch.where(is_block, begins[sequence] + starts, 0)
    tokens = first[:, None] + torch.arange(size, device=rows.device)  # [C, l]

    packed = torch.arange(num_tokens, device=rows.device)
    sequence = (torch.searchsorted(begins, packed, right=True) - 1).clamp(0, last_sequence)
    position = packed - begins[sequence]
    back = torch.arange(size // stride, device=rows.device)
    block = position[:, None] // stride - back  # [T, l / d]
    count = (offsets[sequence + 1] - offsets[sequence])[:, None]
    place = (offsets[sequence][:, None] + block) * size + (position % stride)[:, None]
    places = torch.where((block >= 0) & (block < count), place + back * stride, -1)
    return CompressionBlocks(tokens.clamp(max=num_tokens - 1), places, starts)


class _GatherBlocks(torch.autograd.Function):
    """Tokens to blocks. A token's gradient is gathered from its places: no atomics, one order."""

    @staticmethod
    def forward(x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        return x[:, tokens]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        parts = grad.flatten(1, 2)[:, places.clamp(min=0)]  # [G, T, l / d, W]
        return parts.masked_fill((places < 0)[None, :, :, None], 0).sum(2), None, None


def gather_blocks(x: Tensor, blocks: CompressionBlocks) -> Tensor:
    """Tokens x [T, G, W] as blocks [G, C, l, W]."""
    grouped = x.transpose(0, 1)
    result = _GatherBlocks.apply(grouped, blocks.tokens, blocks.places)
    assert isinstance(result, Tensor)
    return result


class Compression(nn.Module):
    """phi with its own parameters for each key/value head.

    mean: the mean of the block. linear: one matrix on the flattened block, which starts as the
    mean. mlp: the mean and a two-layer correction that starts at zero. The learned position of a
    token in its block is added before the matrices.
    """

    def __init__(self, config: NsaAttentionConfig, *, width: int) -> None:
        super().__init__()
        self.kind = config.compression
        groups, size = config.kv_heads, config.compression_block_size
        if self.kind != "mean":
            self.position = nn.Parameter(torch.empty(groups, size, width))
            self.fold = nn.Parameter(torch.empty(groups, size * width, width))
        if self.kind == "mlp":
            self.correct = nn.Parameter(torch.empty(groups, width, width))

    def forward(self, blocks: Tensor) -> Tensor:
        """Fold blocks [G, C, l, W] into [C, G, W]."""
        if self.kind == "mean":
            return blocks.mean(2).transpose(0, 1)
        placed = blocks + self.position[:, None].to(blocks.dtype)
        folded = torch.bmm(placed.flatten(2), self.fold)
        if self.kind == "mlp":
            correction = torch.bmm(nn.functional.silu(folded), self.correct)
            folded = blocks.mean(2).to(correction.dtype) + correction
        return folded.transpose(0, 1)
