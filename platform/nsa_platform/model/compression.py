"""phi: folds the l keys (or values) of a compression block into one (Eq. 7).

Blocks start each d tokens and overlap when d < l, so whole sequences are cut into strides of d
tokens: a block is l / d strides in a row, its projection the sum of theirs, and each stride is
read once. Tables made once for a forward pass say which tokens form a stride and which strides a
block; they have the static bound of T // d rows, so that no count ever travels to the host. Rows
beyond the last one repeat the first tokens, no query sees them, and no gradient comes back from
them.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from nsa_kernels import NsaConfig, Phi, compressed_cu_seqlens, fold_blocks
from nsa_platform.config.model import NsaAttentionConfig

ALL = slice(None)


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
class Table:
    """Rows to gather, and its inverse for the gradient."""

    rows: Tensor
    """int64 [M, L], a row of the source for each place."""
    places: Tensor
    """int64 [N, P], flat places (m * L + column) that hold each row of the source."""
    is_absent: Tensor
    """bool [N, P, 1], where `places` names no place."""

    @classmethod
    def of(cls, rows: Tensor, places: Tensor) -> Self:
        """A table whose `places` are negative where there is none."""
        return cls(rows, places.clamp(min=0), (places < 0)[..., None])


@dataclass(frozen=True, slots=True)
class CompressionBlocks:
    """Which tokens form which stride and which strides form which block, for packed sequences.

    S = C = max(T // d, 1) strides and blocks, P = l / d strides of a block.
    """

    tokens: Table
    """[S, d], packed token of each place of each stride."""
    strides: Table
    """[C, P], the strides of each block."""
    parts: Table
    """[C, P], of S * P rows (stride * P + part): each stride as the part of a block that it is."""
    starts: Tensor
    """int64 [C], position in its sequence at which each block starts."""


def compression_blocks(
    cu_seqlens: Tensor, *, num_tokens: int, config: NsaConfig
) -> CompressionBlocks:
    """The blocks of packed sequences; max(T // d, 1) rows without asking the device."""
    stride, device = config.compression_stride, cu_seqlens.device
    num_parts = config.compression_block_size // stride
    begins = cu_seqlens.long()
    block_offsets = compressed_cu_seqlens(cu_seqlens, config).long()
    stride_offsets = nn.functional.pad((begins.diff() // stride).cumsum(0), (1, 0))
    rows = torch.arange(max(num_tokens // stride, 1), device=device)
    part = torch.arange(num_parts, device=device)

    sequence, position, _ = _rank(begins, torch.arange(num_tokens, device=device))
    is_whole = position // stride < stride_offsets.diff()[sequence]
    token_places = torch.where(is_whole, stride_offsets[sequence] * stride + position, -1)

    sequence, index, is_stride = _rank(stride_offsets, rows)
    first = torch.where(is_stride, begins[sequence] + index * stride, 0)
    tokens = (first[:, None] + torch.arange(stride, device=device)).clamp(max=num_tokens - 1)
    block = index[:, None] - part  # [S, P], the block of which this stride is that part
    has_block = (block >= 0) & (block < block_offsets.diff()[sequence, None])
    places = (block_offsets[sequence, None] + block) * num_parts + part
    places = torch.where(has_block & is_stride[:, None], places, -1)

    sequence, index, is_block = _rank(block_offsets, rows)
    first = torch.where(is_block, stride_offsets[sequence] + index, 0)
    strides = (first[:, None] + part).clamp(max=len(rows) - 1)
    return CompressionBlocks(
        tokens=Table.of(tokens, token_places[:, None]),
        strides=Table.of(strides, places),
        parts=Table.of(strides * num_parts + part, places.reshape(-1, 1)),
        starts=torch.where(is_block, index * stride, 0),
    )


def _rank(offsets: Tensor, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which range [offsets[b], offsets[b + 1]) holds each item, its rank there, whether any does.

    Items behind the last range count as the last one's.
    """
    owner = (torch.searchsorted(offsets, items, right=True) - 1).clamp(0, offsets.numel() - 2)
    return owner, items - offsets[owner], items < offsets[-1]


class _Gather(torch.autograd.Function):
    """Rows by a table. A row's gradient is gathered from its places: no atomics, one order."""

    @staticmethod
    def forward(x: Tensor, rows: Tensor, places: Tensor, is_absent: Tensor) -> Tensor:
        return x[:, rows]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        places, is_absent = ctx.saved_tensors
        parts = grad.flatten(1, 2)[:, places].masked_fill(is_absent, 0)  # [G, N, P, W]
        return parts.squeeze(2) if places.shape[1] == 1 else parts.sum(2), None, None, None


def gather_rows(x: Tensor, table: Table) -> Tensor:
    """Rows of x [G, N, W] by a table [M, L], as [G, M, L, W]."""
    result = _Gather.apply(x, table.rows, table.places, table.is_absent)
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
        """Fold single blocks [G, C, l, W] into [C, G, W]."""
        return fold_blocks(blocks, self.phi)

    @property
    def phi(self) -> Phi:
        """The parameters, as the kernels take them."""
        if self.kind == "mean":
            return Phi()
        return Phi(self.position, self.fold, self.correct if self.kind == "mlp" else None)

    def fold_packed(self, x: Tensor, blocks: CompressionBlocks, heads: slice = ALL) -> Tensor:
        """Fold all blocks of packed sequences, tokens x [T, G, W], into [C, G, W].

        The same as forward on the gathered blocks. A stride meets the matrices of all its places
        in a block at once, and the positions become one vector that is added to each block.

        Args:
            heads: which of the layer's key/value heads the G heads of x are.
        """
        exact = torch.promote_types(x.dtype, torch.float32)
        strides = gather_rows(x.transpose(0, 1), blocks.tokens)
        mean = None
        if self.kind != "linear":
            means = strides.mean(2, dtype=exact)  # [G, S, W]
            mean = gather_rows(means, blocks.strides).mean(2)
        if self.kind == "mean":
            assert mean is not None
            return mean.transpose(0, 1)
        position, fold = self.position[heads], self.fold[heads]
        products = gather_rows(self._fold_strides(strides, fold), blocks.parts)
        folded = products.sum(2, dtype=exact) + self._fold_positions(position, fold, exact)
        if mean is not None:
            folded = self._correct(mean, folded.to(x.dtype), self.correct[heads])
        return folded.transpose(0, 1)

    def _fold_strides(self, strides: Tensor, fold: Tensor) -> Tensor:
        """Products of strides [G, S, d, W] with fold's rows for each of the P parts of a block,
        [G, S * P, W]."""
        parts = self.position.shape[1] // strides.shape[2]
        side_by_side = fold.unflatten(1, (parts, -1)).transpose(1, 2).flatten(2)
        products = torch.bmm(strides.flatten(2), side_by_side)  # [G, S, P * W]
        return products.unflatten(2, (parts, -1)).flatten(1, 2)

    def _fold_positions(self, position: Tensor, fold: Tensor, exact: torch.dtype) -> Tensor:
        """What the positions add to each folded block, [G, 1, W]: one pass over fold."""
        products = position.flatten(1)[..., None] * fold
        return products.sum(1, keepdim=True, dtype=exact)

    def _correct(self, mean: Tensor, folded: Tensor, correct: Tensor) -> Tensor:
        """The mean and the two-layer correction, [G, C, W]."""
        correction = torch.bmm(nn.functional.silu(folded), correct)
        return mean.to(correction.dtype) + correction
