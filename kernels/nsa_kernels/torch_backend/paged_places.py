"""Rows and angles of new tokens, each step an op of torch's."""

import torch
from torch import Tensor

from nsa_kernels.new_rows import NewBlocks
from nsa_kernels.new_tokens import NewPlaces, NewTokens, most_new_blocks
from nsa_kernels.shapes import NsaConfig


def place_new_tokens(
    tokens: NewTokens,
    frequencies: Tensor,
    page_size: int,
    config: NsaConfig | None,
    is_rotated: bool,
    dtype: torch.dtype,
) -> NewPlaces:
    """Rows and angles of a step."""
    packed = torch.arange(len(tokens.positions), device=tokens.positions.device)
    sequence = _owner(tokens.cu_seqlens, packed)
    positions = tokens.positions.long()
    window_rows, blocks = None, None
    if config is not None:
        assert tokens.window_page_table is not None
        window_rows = _rows(tokens.window_page_table, sequence, positions, page_size)
        blocks = _new_blocks(tokens, frequencies, page_size, config, is_rotated, dtype)
    token_rows = _rows(tokens.page_table, sequence, positions, page_size)
    is_own = positions >= tokens.shared_lens[sequence]
    cos, sin = _angles(positions, frequencies, dtype)
    return NewPlaces(torch.where(is_own, token_rows, 0), window_rows, cos, sin, blocks)


def _new_blocks(
    tokens: NewTokens,
    frequencies: Tensor,
    page_size: int,
    config: NsaConfig,
    is_rotated: bool,
    dtype: torch.dtype,
) -> NewBlocks:
    size, stride = config.compression_block_size, config.compression_stride
    assert tokens.window_page_table is not None
    contexts = tokens.context_lens.long()
    before = _num_blocks(contexts - tokens.cu_seqlens.long().diff(), size, stride)
    added = _num_blocks(contexts, size, stride) - before
    offsets = torch.cat([added.new_zeros(1), added.cumsum(0)])
    bound = most_new_blocks(len(tokens.positions), len(contexts), stride)

    entry = torch.arange(bound, device=contexts.device)
    sequence = _owner(offsets, entry)
    is_block = entry < offsets[-1]
    index = before[sequence] + entry - offsets[sequence]
    starts = torch.where(is_block, index * stride, 0)
    members = starts[:, None] + torch.arange(size, device=contexts.device)
    tail_rows = _rows(tokens.window_page_table, sequence[:, None], members, page_size)
    rows = _rows(tokens.page_table, sequence, starts, page_size) // stride
    cos, sin = _angles(starts, frequencies, dtype)
    return NewBlocks(
        tail_rows=torch.where(is_block[:, None], tail_rows, 0),
        rows=torch.where(is_block & (starts >= tokens.shared_lens[sequence]), rows, 0),
        cos=cos,
        sin=sin,
        is_rotated=is_rotated,
    )


def _angles(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = positions.double()[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _num_blocks(lengths: Tensor, size: int, stride: int) -> Tensor:
    """Complete compression blocks of sequences with these lengths (none below l tokens)."""
    whole = torch.div(lengths - size, stride, rounding_mode="floor") + 1
    return whole.clamp(min=0)


def _owner(offsets: Tensor, items: Tensor) -> Tensor:
    """Which of the ranges [offsets[b], offsets[b + 1]) holds each item; the last for the rest."""
    owner = torch.searchsorted(offsets.long(), items, right=True) - 1
    return owner.clamp(0, offsets.numel() - 2)


def _rows(page_table: Tensor, sequence: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """Pool row of each position; positions without a page share the scratch page 0."""
    logical = (positions // page_size).clamp(max=page_table.shape[1] - 1)
    page = page_table.long()[sequence, logical].clamp(min=0)
    return page * page_size + positions % page_size
