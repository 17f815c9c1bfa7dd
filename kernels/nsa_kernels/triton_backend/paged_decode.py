"""Attention of few new tokens per sequence over paged caches: three launches.

The compressed parts, the choice with the selected and sliding parts, and the merge. Keys are split
so that few sequences still fill the GPU. Everything is planned from shapes, so that a captured
graph serves any contents.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from nsa_kernels.packing import num_tiles
from nsa_kernels.shapes import NsaConfig
from nsa_kernels.triton_backend.paged_chosen import paged_chosen_kernel
from nsa_kernels.triton_backend.paged_compressed import paged_compressed_kernel
from nsa_kernels.triton_backend.paged_merge import paged_merge_kernel
from nsa_kernels.triton_backend.tiles import LOG2_E, key_widths, value_widths

# Two programs for each processor of a large GPU.
_WANTED_PROGRAMS = 264
_MOST_SPLITS = 64
# Rows of a matrix product: the least there is for one token, more where tokens share their keys.
_LEAST_ROWS = 16
_SHARING_ROWS = 64
# A token's importances lie in registers.
_MOST_BLOCKS = 4096
_MOST_TOKENS = 16
_TILE_B = 256


@dataclass(frozen=True, slots=True)
class Launch:
    """Keys of a tile, parts that the keys are cut into, and how the compiler spreads a program."""

    keys: int
    splits: int
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """How a call is cut into programs."""

    tokens: int
    """New tokens of a program of the compressed branch."""
    tile_blocks: int
    """Selection blocks of a tile of compressed keys."""
    compressed: Launch
    selected: Launch
    sliding_splits: int
    pdl: bool = False
    """Whether a launch may begin before the one before it ends, as Hopper GPUs can."""

    @property
    def splits(self) -> int:
        return self.compressed.splits + self.selected.splits + self.sliding_splits


def is_decode(num_tokens: int, num_sequences: int, num_blocks: int, config: NsaConfig) -> bool:
    """Whether so many new tokens of contexts of up to num_blocks take this way."""
    strides = config.selection_block_size // config.compression_stride
    return (
        num_tokens <= _MOST_TOKENS * num_sequences
        and num_blocks <= _MOST_BLOCKS
        and strides <= 64
        and config.selection_block_size <= 256
    )


def make_plan(
    num_tokens: int,
    num_sequences: int,
    num_groups: int,
    group_size: int,
    width: int,
    dtype: torch.dtype,
    context: int,
    config: NsaConfig,
) -> Plan:
    """The plan for contexts of up to `context` tokens, for rows of up to `width` elements."""
    padded = triton.next_power_of_2(group_size)
    rows = _LEAST_ROWS if num_tokens < 4 * num_sequences else _SHARING_ROWS
    tokens = max(1, rows // padded) if rows > _LEAST_ROWS else 1
    strides = triton.next_power_of_2(config.selection_block_size // config.compression_stride)
    keys = 64 if width * dtype.itemsize <= 256 else 32
    programs = num_groups * (
        num_tokens if tokens == 1 else num_tiles(num_tokens, num_sequences, tokens)
    )
    num_keys = context // config.compression_stride
    chosen = min(config.num_selected_blocks * config.selection_block_size, context)
    tile_blocks = max(1, keys // strides)
    # A window touches one block more than it has keys for.
    window = min(config.window_size + config.selection_block_size - 1, context)
    one_token = num_tokens * num_groups
    return Plan(
        tokens=tokens,
        tile_blocks=tile_blocks,
        compressed=Launch(keys, _num_splits(num_keys, keys, programs)),
        selected=Launch(keys, _num_splits(chosen, keys, one_token)),
        sliding_splits=_num_splits(window, keys, one_token),
    )


def _num_splits(num_keys: int, tile: int, programs: int) -> int:
    """Parts of num_keys keys that keep a GPU busy, whole tiles each."""
    return max(1, min(_MOST_SPLITS, triton.cdiv(num_keys, tile), _WANTED_PROGRAMS // programs))


def decode_attention(
    q: Tensor,
    caches: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    gates: Tensor,
    page_table: Tensor,
    window_page_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    config: NsaConfig,
    scale: float,
    plan: Plan,
) -> Tensor:
    """Gated sum of the three branches for every new token, [T, H, V].

    Tokens past the last sequence, as a captured batch may have, get 0.
    """
    k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = caches
    num_tokens, num_heads, key_width = q.shape
    num_sequences, num_pages = page_table.shape
    page, num_groups, value_width = v_slc.shape[1:]
    group_size = num_heads // num_groups
    padded = triton.next_power_of_2(group_size)
    strides = config.selection_block_size // config.compression_stride
    num_blocks = num_pages * page // config.selection_block_size
    tiles = triton.cdiv(num_blocks, plan.tile_blocks)
    compressed, selected, sliding = plan.compressed, plan.selected, plan.sliding_splits

    def scratch(*sizes: int) -> Tensor:
        return torch.empty(*sizes, dtype=torch.float32, device=q.device)

    partial_out = scratch(num_tokens, num_heads, plan.splits, value_width)
    partial_lse = scratch(num_tokens, num_heads, plan.splits)
    shares = scratch(num_tokens, num_heads, tiles, plan.tile_blocks)
    rests, maxima = scratch(2, num_tokens, num_heads, tiles)
    choices = (num_tokens, num_groups, selected.splits)
    importance = scratch(*choices, tiles, plan.tile_blocks)
    chosen_blocks = torch.empty(
        *choices, config.num_selected_blocks, dtype=torch.int32, device=q.device
    )
    out = q.new_empty(num_tokens, num_heads, value_width)
    tile_b = min(_TILE_B, triton.next_power_of_2(num_sequences))
    query_tiles = (
        num_tokens if plan.tokens == 1 else num_tiles(num_tokens, num_sequences, plan.tokens)
    )
    overlap = {"launch_pdl": True} if plan.pdl else {}
    widths = {**key_widths(key_width), **value_widths(value_width)}

    paged_compressed_kernel[(query_tiles * num_groups, compressed.splits)](
        q,
        k_cmp,
        v_cmp,
        page_table,
        cu_seqlens,
        context_lens,
        partial_out,
        partial_lse,
        shares,
        rests,
        maxima,
        scale * LOG2_E,
        num_sequences,
        num_groups,
        num_pages,
        tiles,
        R=group_size,
        R_PADDED=max(_LEAST_ROWS, padded) if plan.tokens == 1 else padded,
        TILE_ROWS=max(_LEAST_ROWS, padded) if plan.tokens == 1 else padded * plan.tokens,
        **widths,
        COMPRESSION_BLOCK=config.compression_block_size,
        STRIDE=config.compression_stride,
        SELECTION_BLOCK=config.selection_block_size,
        CHOSEN=config.num_selected_blocks,
        PAGE_ROWS=k_cmp.shape[1],
        SPLITS=compressed.splits,
        ALL_SPLITS=plan.splits,
        TILE_S=plan.tile_blocks,
        STRIDES_PADDED=triton.next_power_of_2(strides),
        TILE_B=tile_b,
        PDL=plan.pdl,
        num_warps=compressed.num_warps,
        num_stages=compressed.num_stages,
    )
    paged_chosen_kernel[(num_tokens * num_groups, selected.splits + sliding)](
        q,
        k_slc,
        v_slc,
        k_win,
        v_win,
        page_table,
        window_page_table,
        cu_seqlens,
        context_lens,
        shares,
        rests,
        maxima,
        importance,
        chosen_blocks,
        partial_out,
        partial_lse,
        scale * LOG2_E,
        num_sequences,
        num_groups,
        num_pages,
        tiles,
        R=group_size,
        R_PADDED=max(_LEAST_ROWS, padded),
        R_CHOICE=padded,
        **widths,
        COMPRESSION_BLOCK=config.compression_block_size,
        STRIDE=config.compression_stride,
        SELECTION_BLOCK=config.selection_block_size,
        CHOSEN=config.num_selected_blocks,
        INITIAL=config.num_initial_blocks,
        LOCAL=config.num_local_blocks,
        WINDOW=config.window_size,
        PAGE_ROWS=page,
        SPLITS_CMP=compressed.splits,
        SPLITS_PADDED=triton.next_power_of_2(compressed.splits),
        SPLITS_SLC=selected.splits,
        SPLITS_WIN=sliding,
        NUM_BLOCKS=triton.next_power_of_2(tiles * plan.tile_blocks),
        TILE_N=max(1, min(triton.next_power_of_2(tiles), 4096 // (padded * plan.tile_blocks))),
        TILE_S=plan.tile_blocks,
        TILE_K=selected.keys,
        TILE_B=tile_b,
        PDL=plan.pdl,
        num_warps=selected.num_warps,
        num_stages=selected.num_stages,
        **overlap,
    )
    paged_merge_kernel[(num_tokens, num_heads)](
        partial_out,
        partial_lse,
        gates,
        None,
        None,
        cu_seqlens,
        out,
        num_sequences,
        num_heads,
        **value_widths(value_width),
        SPLITS_CMP=compressed.splits,
        SPLITS_SLC=selected.splits,
        SPLITS_WIN=sliding,
        SPLITS_PADDED=triton.next_power_of_2(plan.splits),
        PDL=plan.pdl,
        num_warps=1 if plan.splits <= 8 else 4,
        **overlap,
    )
    return out
