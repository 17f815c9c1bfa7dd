"""Attention of new tokens over paged caches: launches of static shapes, without a host sync.

NSA takes five kernels after the rows are located: the compressed parts, the importance of the
selection blocks, the top n, the selected and sliding parts, and the merge. Long inputs go through
in chunks of tokens, so that importances and parts never grow with their square.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from nsa_kernels.shapes import NsaConfig
from nsa_kernels.triton_backend.importance import paged_importance_kernel
from nsa_kernels.triton_backend.paged_merge import paged_merge_kernel
from nsa_kernels.triton_backend.paged_rows import locate_rows
from nsa_kernels.triton_backend.paged_selected import paged_selected_sliding_forward_kernel
from nsa_kernels.triton_backend.paged_span import paged_span_forward_kernel
from nsa_kernels.triton_backend.tiles import LOG2_E, key_widths, value_widths
from nsa_kernels.triton_backend.topn import top_blocks

# Two programs for each processor of a large GPU; more parts only cost more merging.
_WANTED_PROGRAMS = 264
_LEAST_KEYS_PER_SPLIT = 128
_MOST_SPLITS = 64
_TILE_S = 64
# Bytes of importances and parts alive at once.
_BUFFER_BYTES = 256 * 2**20


class Splits(NamedTuple):
    """How many parts a token's keys are cut into, per branch."""

    compressed: int
    selected: int
    sliding: int

    @property
    def total(self) -> int:
        return self.compressed + self.selected + self.sliding


def num_splits(num_keys: int, num_programs: int) -> int:
    """Parts of num_keys keys (the most that can be) that keep a GPU busy with num_programs rows."""
    most = max(1, min(_MOST_SPLITS, num_keys // _LEAST_KEYS_PER_SPLIT))
    return min(most, triton.cdiv(_WANTED_PROGRAMS, num_programs))


def head_sizes(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """Sizes that every paged kernel takes, with their padding to what a matrix product accepts."""
    group_size = q.shape[1] // k.shape[-2]
    return {
        "R": group_size,
        "R_PADDED": max(16, triton.next_power_of_2(group_size)),
        **key_widths(k.shape[-1]),
        **value_widths(v.shape[-1]),
    }


def key_tile(sizes: dict[str, int], dtype: torch.dtype) -> int:
    """Keys of one tile: a row of up to 256 bytes allows 64, a longer one 32."""
    row_bytes = max(sizes["K"], sizes["V"]) * dtype.itemsize
    return 64 if row_bytes <= 256 else 32


def rows_per_chunk(num_tokens: int, bytes_per_token: int) -> int:
    return max(1, min(num_tokens, _BUFFER_BYTES // bytes_per_token))


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
) -> Tensor:
    """Gated sum of the three branches for every new token; out [T, H, V]."""
    num_tokens, num_heads, _ = q.shape
    page, num_groups, v_width = v_slc.shape[1:]
    num_pages = page_table.shape[1]
    out = q.new_empty(num_tokens, num_heads, v_width)
    if num_tokens == 0:
        return out
    context = num_pages * page
    num_blocks = context // config.selection_block_size
    chosen = config.num_selected_blocks
    programs = num_tokens * num_groups
    splits = Splits(
        num_splits(context // config.compression_stride, programs),
        num_splits(min(chosen * config.selection_block_size, context), programs),
        num_splits(min(config.window_size, context), programs),
    )
    rows = locate_rows(cu_seqlens, context_lens, num_tokens)
    sizes = head_sizes(q, k_slc, v_slc)
    tile_k = key_tile(sizes, q.dtype)
    part_bytes = 4 * num_heads * splits.total * (v_width + 1)
    chunk = rows_per_chunk(num_tokens, 4 * num_groups * num_blocks + part_bytes)
    float32 = {"dtype": torch.float32, "device": q.device}
    importance = torch.empty(chunk, num_groups, num_blocks, **float32)
    block_indices = torch.empty(chunk, num_groups, chosen, dtype=torch.int32, device=q.device)
    partial_out = torch.empty(chunk, num_heads, splits.total, v_width, **float32)
    partial_lse = torch.empty(chunk, num_heads, splits.total, **float32)
    key_sizes = {name: sizes[name] for name in ("R", "R_PADDED", "K", "K_MAIN", "K_TAIL")}
    compression = {
        "STRIDE": config.compression_stride,
        "PAGE_ROWS": page // config.compression_stride,
        "ALL_SPLITS": splits.total,
    }
    for first in range(0, num_tokens, chunk):
        num_rows = min(chunk, num_tokens - first)
        paged_span_forward_kernel[(num_rows, num_groups, splits.compressed)](
            q, k_cmp, v_cmp, page_table, *rows, partial_out, partial_lse, scale * LOG2_E, first,
            num_groups, num_pages, **sizes, **compression, BLOCK=config.compression_block_size,
            SPLITS=splits.compressed, TILE_K=tile_k,
        )  # fmt: skip
        paged_importance_kernel[(num_rows, triton.cdiv(num_blocks, _TILE_S), num_groups)](
            q, k_cmp, page_table, *rows, partial_lse, importance, scale * LOG2_E, first,
            num_groups, num_pages, num_blocks, **key_sizes, **compression,
            COMPRESSION_BLOCK=config.compression_block_size,
            SELECTION_BLOCK=config.selection_block_size, CHOSEN=chosen, SPLITS=splits.compressed,
            SPLITS_PADDED=triton.next_power_of_2(splits.compressed), TILE_S=_TILE_S,
        )  # fmt: skip
        top_blocks(
            importance[:num_rows], rows[1][first : first + num_rows], None, block_indices, config
        )
        grid = (num_rows, num_groups, splits.selected + splits.sliding)
        paged_selected_sliding_forward_kernel[grid](
            q, k_slc, v_slc, k_win, v_win, block_indices, page_table, window_page_table, *rows,
            partial_out, partial_lse, scale * LOG2_E, first, num_groups, num_pages, **sizes,
            SELECTION_BLOCK=config.selection_block_size, CHOSEN=chosen,
            CHOSEN_PADDED=triton.next_power_of_2(chosen), WINDOW=config.window_size,
            PAGE_ROWS=page, SPLITS_CMP=splits.compressed, SPLITS_SLC=splits.selected,
            SPLITS_WIN=splits.sliding, TILE_K=tile_k,
        )  # fmt: skip
        _merge(partial_out, partial_lse, gates, rows[1], out, first, num_rows, splits)
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
    """Causal attention of every new token over its whole paged context; out [T, H, V]."""
    num_tokens, num_heads, _ = q.shape
    page, num_groups, v_width = v.shape[1:]
    num_pages = page_table.shape[1]
    out = q.new_empty(num_tokens, num_heads, v_width)
    if num_tokens == 0:
        return out
    splits = Splits(num_splits(num_pages * page, num_tokens * num_groups), 0, 0)
    rows = locate_rows(cu_seqlens, context_lens, num_tokens)
    sizes = head_sizes(q, k, v)
    chunk = rows_per_chunk(num_tokens, 4 * num_heads * splits.total * (v_width + 1))
    float32 = {"dtype": torch.float32, "device": q.device}
    partial_out = torch.empty(chunk, num_heads, splits.total, v_width, **float32)
    partial_lse = torch.empty(chunk, num_heads, splits.total, **float32)
    for first in range(0, num_tokens, chunk):
        num_rows = min(chunk, num_tokens - first)
        paged_span_forward_kernel[(num_rows, num_groups, splits.total)](
            q, k, v, page_table, *rows, partial_out, partial_lse, scale * LOG2_E, first,
            num_groups, num_pages, **sizes, BLOCK=1, STRIDE=1, PAGE_ROWS=page,
            SPLITS=splits.total, ALL_SPLITS=splits.total, TILE_K=key_tile(sizes, q.dtype),
        )  # fmt: skip
        _merge(partial_out, partial_lse, None, rows[1], out, first, num_rows, splits)
    return out


def _merge(
    partial_out: Tensor,
    partial_lse: Tensor,
    gates: Tensor | None,
    row_positions: Tensor,
    out: Tensor,
    first: int,
    num_rows: int,
    splits: Splits,
) -> None:
    num_heads, v_width = out.shape[1:]
    paged_merge_kernel[(num_rows, num_heads)](
        partial_out,
        partial_lse,
        gates,
        row_positions,
        out,
        first,
        num_heads,
        **value_widths(v_width),
        SPLITS_CMP=splits.compressed,
        SPLITS_SLC=splits.selected,
        SPLITS_WIN=splits.sliding,
        SPLITS_PADDED=triton.next_power_of_2(splits.total),
    )
