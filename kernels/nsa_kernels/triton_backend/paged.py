"""Attention of new tokens over paged caches: launches of static shapes, without a host sync.

NSA takes five kernels after the rows are located: the compressed parts, the importance of the
selection blocks, the top n, the selected and sliding parts, and the merge. Long inputs go through
in chunks of tiles, so that importances and parts never grow with their square.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from nsa_kernels.shapes import NsaConfig
from nsa_kernels.triton_backend.paged_decode import decode_attention, is_decode, make_plan
from nsa_kernels.triton_backend.paged_importance import paged_importance_kernel
from nsa_kernels.triton_backend.paged_merge import merge_parts
from nsa_kernels.triton_backend.paged_rows import Rows, locate_rows
from nsa_kernels.triton_backend.paged_selected import paged_selected_sliding_forward_kernel
from nsa_kernels.triton_backend.paged_span import paged_span_forward_kernel
from nsa_kernels.triton_backend.tiles import (
    LOG2_E,
    key_widths,
    value_widths,
)
from nsa_kernels.triton_backend.topn import top_blocks

# Two programs for each processor of a large GPU; more parts only cost more merging.
_WANTED_PROGRAMS = 264
_LEAST_KEYS_PER_SPLIT = 128
_MOST_SPLITS = 64
# Rows of a matrix product: the least there is for one token, more where tokens share their keys.
_DECODE_ROWS = 16
_PREFILL_ROWS = 64
_TILE_S = 64
# Bytes of importances and parts alive at once.
_BUFFER_BYTES = 256 * 2**20


class Splits(NamedTuple):
    """How many parts a query's keys are cut into, per branch."""

    compressed: int
    selected: int
    sliding: int

    @property
    def total(self) -> int:
        return self.compressed + self.selected + self.sliding


class Parts(NamedTuple):
    """What every branch leaves of a chunk's rows, and how the branches share the parts."""

    out: Tensor
    """fp32 [rows, H, parts, V]."""
    lse: Tensor
    """fp32 [rows, H, parts]."""
    splits: Splits


def num_splits(num_keys: int, num_programs: int) -> int:
    """Parts of num_keys keys (the most that can be) that keep a GPU busy with num_programs."""
    most = max(1, min(_MOST_SPLITS, num_keys // _LEAST_KEYS_PER_SPLIT))
    return min(most, triton.cdiv(_WANTED_PROGRAMS, num_programs))


def tile_rows(num_tokens: int, num_sequences: int, group_size: int) -> int:
    """Queries of a program: few while most sequences bring one token, as in decoding."""
    rows = _DECODE_ROWS if num_tokens < 4 * num_sequences else _PREFILL_ROWS
    return max(rows, triton.next_power_of_2(group_size))


def key_tile(key_width: int, value_width: int, dtype: torch.dtype) -> int:
    """Keys of one tile: rows of up to 256 bytes allow 64, longer ones 32."""
    return 64 if max(key_width, value_width) * dtype.itemsize <= 256 else 32


def new_parts(q: Tensor, num_rows: int, value_width: int, splits: Splits) -> Parts:
    """Room for the parts of num_rows rows."""
    shape = (num_rows, q.shape[1], splits.total)
    out = torch.empty(*shape, value_width, dtype=torch.float32, device=q.device)
    return Parts(out, torch.empty(shape, dtype=torch.float32, device=q.device), splits)


def _span_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page_table: Tensor,
    rows: Rows,
    parts: Parts,
    block: int,
    stride: int,
    scale: float,
) -> None:
    """The first parts: keys of `block` tokens every `stride` up to the query's position."""
    page_rows, num_groups = k.shape[1], k.shape[2]
    group_size = q.shape[1] // num_groups
    padded = triton.next_power_of_2(group_size)
    paged_span_forward_kernel[(rows.num_tiles, num_groups, parts.splits.compressed)](
        q,
        k,
        v,
        page_table,
        rows.sequences,
        rows.positions,
        rows.packed,
        parts.out,
        parts.lse,
        scale * LOG2_E,
        num_groups,
        page_table.shape[1],
        parts.splits.compressed,
        parts.splits.total,
        R=group_size,
        R_PADDED=padded,
        TILE_ROWS=rows.tokens * padded,
        **key_widths(k.shape[3]),
        **value_widths(v.shape[3]),
        BLOCK=block,
        STRIDE=stride,
        PAGE_ROWS=page_rows,
        TILE_K=key_tile(k.shape[3], v.shape[3], k.dtype),
    )


def _choose_blocks(
    q: Tensor,
    k_cmp: Tensor,
    page_table: Tensor,
    rows: Rows,
    parts: Parts,
    config: NsaConfig,
    scale: float,
) -> Tensor:
    """Chosen selection blocks of every row, int32 [rows, G, n]."""
    page_rows, num_groups = k_cmp.shape[1], k_cmp.shape[2]
    num_pages, num_rows = page_table.shape[1], rows.positions.shape[0]
    page = page_rows * config.compression_stride
    num_blocks = num_pages * page // config.selection_block_size
    group_size = q.shape[1] // num_groups
    padded = triton.next_power_of_2(group_size)
    importance = parts.lse.new_empty(num_rows, num_groups, num_blocks)
    grid = (rows.num_tiles, triton.cdiv(num_blocks, _TILE_S), num_groups)
    paged_importance_kernel[grid](
        q,
        k_cmp,
        page_table,
        rows.sequences,
        rows.positions,
        rows.packed,
        parts.lse,
        importance,
        scale * LOG2_E,
        num_groups,
        num_pages,
        num_blocks,
        parts.splits.compressed,
        parts.splits.total,
        R=group_size,
        R_PADDED=padded,
        TILE_ROWS=rows.tokens * padded,
        **key_widths(k_cmp.shape[3]),
        COMPRESSION_BLOCK=config.compression_block_size,
        STRIDE=config.compression_stride,
        SELECTION_BLOCK=config.selection_block_size,
        CHOSEN=config.num_selected_blocks,
        PAGE_ROWS=page_rows,
        TILE_S=_TILE_S,
    )
    shape = (num_rows, num_groups, config.num_selected_blocks)
    block_indices = torch.empty(shape, dtype=torch.int32, device=q.device)
    top_blocks(importance, rows.positions, None, block_indices, config)
    return block_indices


def _tell_blocks(chosen: Tensor, rows: Rows, block_indices: Tensor | None) -> None:
    """Put the blocks of rows, int32 [rows, G, n], where their tokens' belong, if anywhere."""
    if block_indices is None:
        return
    is_token = rows.positions >= 0
    # Rows without a token all write to one place more than there are.
    places = torch.where(is_token, rows.packed, block_indices.shape[0]).long()
    room = torch.cat([block_indices, block_indices.new_empty(1, *block_indices.shape[1:])])
    room[places] = chosen
    block_indices.copy_(room[:-1])


def _selected_sliding_parts(
    q: Tensor,
    caches: tuple[Tensor, Tensor, Tensor, Tensor],
    block_indices: Tensor,
    page_table: Tensor,
    window_page_table: Tensor,
    rows: Rows,
    parts: Parts,
    config: NsaConfig,
    scale: float,
) -> None:
    """The parts behind the compressed ones, from the caches k_slc, v_slc, k_win, v_win."""
    page, num_groups, key_width = caches[0].shape[1:]
    value_width = caches[1].shape[3]
    group_size = q.shape[1] // num_groups
    splits = parts.splits
    grid = (rows.positions.shape[0], num_groups, splits.selected + splits.sliding)
    paged_selected_sliding_forward_kernel[grid](
        q,
        *caches,
        block_indices,
        page_table,
        window_page_table,
        rows.sequences,
        rows.positions,
        rows.packed,
        parts.out,
        parts.lse,
        scale * LOG2_E,
        num_groups,
        page_table.shape[1],
        *splits,
        R=group_size,
        R_PADDED=max(_DECODE_ROWS, triton.next_power_of_2(group_size)),
        **key_widths(key_width),
        **value_widths(value_width),
        SELECTION_BLOCK=config.selection_block_size,
        CHOSEN=config.num_selected_blocks,
        CHOSEN_PADDED=triton.next_power_of_2(config.num_selected_blocks),
        WINDOW=config.window_size,
        PAGE_ROWS=page,
        TILE_K=key_tile(key_width, value_width, q.dtype),
    )


def _merge(parts: Parts, gates: Tensor | None, rows: Rows, out: Tensor) -> None:
    """Join the parts of every row into its packed token's output."""
    splits = (parts.splits.compressed, parts.splits.selected, parts.splits.sliding)
    merge_parts(parts.out, parts.lse, splits, gates, out, rows=(rows.positions, rows.packed))


def _locate(
    q: Tensor, cu_seqlens: Tensor, context_lens: Tensor, num_groups: int
) -> tuple[Rows, int]:
    """The rows of all new tokens, and how many programs they make at most but for empty ones."""
    num_tokens, num_sequences = q.shape[0], context_lens.shape[0]
    group_size = q.shape[1] // num_groups
    tokens = tile_rows(num_tokens, num_sequences, group_size) // triton.next_power_of_2(group_size)
    rows = locate_rows(cu_seqlens, context_lens, num_tokens, tokens)
    return rows, min(num_tokens, rows.num_tiles) * num_groups


def _tiles_per_chunk(rows: Rows, bytes_per_row: int) -> int:
    return max(1, _BUFFER_BYTES // (bytes_per_row * rows.tokens))


def paged_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    page_table: Tensor,
    window_page_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    config: NsaConfig,
    scale: float,
    block_indices: Tensor | None = None,
) -> Tensor:
    """Gated sum of the three branches for every new token, [T, H, V].

    Tokens past the last sequence, as a captured batch may have, get 0. block_indices [T, G, n] gets
    the selected blocks.
    """
    num_tokens, num_heads, key_width = q.shape
    page, num_groups, value_width = v_slc.shape[1:]
    if num_tokens == 0:
        return q.new_empty(0, num_heads, value_width)
    context = page_table.shape[1] * page
    num_sequences, num_blocks = context_lens.shape[0], context // config.selection_block_size
    if is_decode(num_tokens, num_sequences, num_blocks, config):
        plan = make_plan(
            num_tokens, num_sequences, num_groups, num_heads // num_groups,
            max(key_width, value_width), q.dtype, context, config,
        )  # fmt: skip
        return decode_attention(
            q, (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win), gates, page_table, window_page_table,
            cu_seqlens, context_lens, config, scale, plan, block_indices=block_indices,
        )  # fmt: skip
    out = q.new_zeros(num_tokens, num_heads, value_width)
    rows, programs = _locate(q, cu_seqlens, context_lens, num_groups)
    chosen = min(config.num_selected_blocks * config.selection_block_size, context)
    splits = Splits(
        num_splits(context // config.compression_stride, programs),
        num_splits(chosen, num_tokens * num_groups),
        num_splits(min(config.window_size, context), num_tokens * num_groups),
    )
    part_bytes = 4 * num_heads * splits.total * (value_width + 1)
    chunk = _tiles_per_chunk(rows, 4 * num_groups * num_blocks + part_bytes)
    block, stride = config.compression_block_size, config.compression_stride
    for first in range(0, rows.num_tiles, chunk):
        some = rows.cut(first, chunk)
        parts = new_parts(q, some.positions.shape[0], value_width, splits)
        _span_parts(q, k_cmp, v_cmp, page_table, some, parts, block, stride, scale)
        chosen = _choose_blocks(q, k_cmp, page_table, some, parts, config, scale)
        _tell_blocks(chosen, some, block_indices)
        caches = (k_slc, v_slc, k_win, v_win)
        _selected_sliding_parts(
            q, caches, chosen, page_table, window_page_table, some, parts, config, scale
        )
        _merge(parts, gates, some, out)
    return out


def full_paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of every new token over its whole paged context, [T, H, V].

    Tokens past the last sequence, as a captured batch may have, get 0.
    """
    num_tokens, num_heads, _ = q.shape
    page, num_groups, value_width = v.shape[1:]
    out = q.new_zeros(num_tokens, num_heads, value_width)
    if num_tokens == 0:
        return out
    rows, programs = _locate(q, cu_seqlens, context_lens, num_groups)
    splits = Splits(num_splits(page_table.shape[1] * page, programs), 0, 0)
    chunk = _tiles_per_chunk(rows, 4 * num_heads * splits.total * (value_width + 1))
    for first in range(0, rows.num_tiles, chunk):
        some = rows.cut(first, chunk)
        parts = new_parts(q, some.positions.shape[0], value_width, splits)
        _span_parts(q, k, v, page_table, some, parts, 1, 1, scale)
        _merge(parts, None, some, out)
    return out
