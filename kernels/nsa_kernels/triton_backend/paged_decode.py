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
from nsa_kernels.triton_backend.paged_merge import merge_parts
from nsa_kernels.triton_backend.tiles import (
    LOG2_E,
    early_start,
    key_widths,
    register_limit,
    value_widths,
)

# Two programs for each processor of a large GPU, and one for each: of those that choose every one
# reads all importances, so they are few, of many threads.
_WANTED_PROGRAMS = 264
_WANTED_CHOICES = 132
_CHOICE_WARPS = 8
_MOST_SPLITS = 64
# Fewer sequences are as fast in the same kernel, which a server compiles only once.
_LEAST_TILE_B = 64
_MOST_TILE_B = 256
# Rows of a matrix product: the least there is for one token, more where tokens share their keys.
_LEAST_ROWS = 16
_SHARING_ROWS = 64
# A token's importances lie in registers.
_MOST_BLOCKS = 4096
_MOST_TOKENS = 16
# Importances that a program holds at once, and twice as many where they are more than that anyway
# or programs are few: each turn waits for its loads.
_HELD_IMPORTANCES = 8192
# Registers of a thread, with which a program of the choice leaves room for one of another launch.
_CHOICE_REGISTERS = 168


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

    @property
    def splits(self) -> tuple[int, int, int]:
        """Parts of the compressed, the selected and the sliding branch."""
        return self.compressed.splits, self.selected.splits, self.sliding_splits


@dataclass(frozen=True, slots=True)
class Places:
    """Where the new tokens and their pages are; sequences in packed order."""

    page_table: Tensor
    """int32 [B, M]."""
    window_page_table: Tensor
    """int32 [B, M]."""
    cu_seqlens: Tensor
    """int32 [B + 1]."""
    context_lens: Tensor
    """int32 [B]."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """What one launch leaves for the next: fp32 but for chosen_blocks. N is tiles of keys."""

    partial_out: Tensor
    """[T, H, parts, V]."""
    partial_lse: Tensor
    """[T, H, parts]."""
    shares: Tensor
    """[T, H, N, blocks of a tile], as paged_compressed_kernel says."""
    rests: Tensor
    """[T, H, N]."""
    maxima: Tensor
    """[T, H, N]."""
    importance: Tensor
    """[T, G, selected parts, N, blocks of a tile]."""
    chosen_blocks: Tensor
    """int32 [T, G, selected parts, n]."""

    @classmethod
    def allocate(
        cls, q: Tensor, v_slc: Tensor, num_pages: int, plan: Plan, config: NsaConfig
    ) -> "Scratch":
        """Room for the tokens of q [T, H, K] over num_pages pages of v_slc [.., page, G, V]."""
        num_tokens, num_heads, _ = q.shape
        page, num_groups, value_width = v_slc.shape[1:]
        num_blocks = num_pages * page // config.selection_block_size
        tiles = triton.cdiv(num_blocks, plan.tile_blocks)
        choices = (num_tokens, num_groups, plan.selected.splits)

        def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*sizes, dtype=dtype, device=q.device)

        rests, maxima = empty(2, num_tokens, num_heads, tiles)
        return cls(
            partial_out=empty(num_tokens, num_heads, sum(plan.splits), value_width),
            partial_lse=empty(num_tokens, num_heads, sum(plan.splits)),
            shares=empty(num_tokens, num_heads, tiles, plan.tile_blocks),
            rests=rests,
            maxima=maxima,
            importance=empty(*choices, tiles, plan.tile_blocks),
            chosen_blocks=empty(*choices, config.num_selected_blocks, dtype=torch.int32),
        )

    @property
    def tiles(self) -> int:
        return self.rests.shape[2]


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
        selected=Launch(
            keys, _num_splits(chosen, keys, one_token, _WANTED_CHOICES), num_warps=_CHOICE_WARPS
        ),
        sliding_splits=_num_splits(window, keys, one_token, _WANTED_CHOICES),
    )


def _num_splits(num_keys: int, tile: int, programs: int, wanted: int = _WANTED_PROGRAMS) -> int:
    """Parts of num_keys keys that keep a GPU busy, whole tiles each."""
    return max(1, min(_MOST_SPLITS, triton.cdiv(num_keys, tile), wanted // programs))


def _constants(
    q: Tensor, v: Tensor, places: Places, plan: Plan, config: NsaConfig
) -> dict[str, int]:
    """The constants that both attention kernels want, of v [.., rows, G, V]."""
    padded_sequences = triton.next_power_of_2(places.context_lens.shape[0])
    return {
        "R": q.shape[1] // v.shape[2],
        **key_widths(q.shape[2]),
        **value_widths(v.shape[3]),
        "COMPRESSION_BLOCK": config.compression_block_size,
        "STRIDE": config.compression_stride,
        "SELECTION_BLOCK": config.selection_block_size,
        "CHOSEN": config.num_selected_blocks,
        "PAGE_ROWS": v.shape[1],
        "TILE_S": plan.tile_blocks,
        "TILE_B": min(_MOST_TILE_B, max(_LEAST_TILE_B, padded_sequences)),
        "STARTS_EARLY": bool(early_start(q.device)),
    }


def _compressed_parts(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    places: Places,
    scratch: Scratch,
    plan: Plan,
    config: NsaConfig,
    scale: float,
) -> None:
    """The first parts, with the shares of the selection blocks."""
    num_tokens, num_heads, _ = q.shape
    num_sequences, num_pages = places.page_table.shape
    num_groups = k_cmp.shape[2]
    padded = triton.next_power_of_2(num_heads // num_groups)
    query_tiles, rows = num_tokens, max(_LEAST_ROWS, padded)
    if plan.tokens > 1:
        query_tiles = num_tiles(num_tokens, num_sequences, plan.tokens)
        rows = padded * plan.tokens
    strides = config.selection_block_size // config.compression_stride
    launch = plan.compressed
    paged_compressed_kernel[(query_tiles * num_groups, launch.splits)](
        q, k_cmp, v_cmp, places.page_table, places.cu_seqlens, places.context_lens,
        scratch.partial_out, scratch.partial_lse, scratch.shares, scratch.rests, scratch.maxima,
        scale * LOG2_E, num_sequences, num_groups, num_pages, scratch.tiles,
        launch.splits, sum(plan.splits),
        **_constants(q, v_cmp, places, plan, config),
        R_PADDED=rows // plan.tokens,
        TILE_ROWS=rows,
        STRIDES_PADDED=triton.next_power_of_2(strides),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **early_start(q.device),
    )  # fmt: skip


def _chosen_parts(
    q: Tensor,
    caches: tuple[Tensor, Tensor, Tensor, Tensor],
    places: Places,
    scratch: Scratch,
    plan: Plan,
    config: NsaConfig,
    scale: float,
) -> None:
    """The choice and the parts behind the compressed ones, from k_slc, v_slc, k_win, v_win."""
    num_tokens, num_heads, _ = q.shape
    num_sequences, num_pages = places.page_table.shape
    v_slc = caches[1]
    num_groups = v_slc.shape[2]
    padded = triton.next_power_of_2(num_heads // num_groups)
    tiles, launch = scratch.tiles, plan.selected
    held = max(1, _HELD_IMPORTANCES // (padded * plan.tile_blocks))
    is_lonely = num_tokens * num_groups * launch.splits <= _WANTED_CHOICES // 2
    held *= 2 if is_lonely or tiles > 2 * held else 1
    paged_chosen_kernel[(num_tokens * num_groups, launch.splits + plan.sliding_splits)](
        q, *caches, places.page_table, places.window_page_table, places.cu_seqlens,
        places.context_lens, scratch.shares, scratch.rests, scratch.maxima, scratch.importance,
        scratch.chosen_blocks, scratch.partial_out, scratch.partial_lse,
        scale * LOG2_E, num_sequences, num_groups, num_pages, tiles, *plan.splits,
        **_constants(q, v_slc, places, plan, config),
        R_PADDED=max(_LEAST_ROWS, padded),
        R_CHOICE=padded,
        INITIAL=config.num_initial_blocks,
        LOCAL=config.num_local_blocks,
        WINDOW=config.window_size,
        SPLITS_PADDED=_MOST_SPLITS,
        NUM_BLOCKS=triton.next_power_of_2(tiles * plan.tile_blocks),
        TILE_N=min(triton.next_power_of_2(tiles), held),
        TILE_K=launch.keys,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **register_limit(q.device, _CHOICE_REGISTERS),
        **early_start(q.device),
    )  # fmt: skip


def _tell_blocks(chosen: Tensor, places: Places, config: NsaConfig, block_indices: Tensor) -> None:
    """The chosen blocks [T, G, n] of tokens that had a choice, all blocks of the others."""
    num_tokens, _, most = block_indices.shape
    ends = places.cu_seqlens[1:].long()
    token = torch.arange(num_tokens, device=ends.device)
    sequence = torch.searchsorted(ends, token, right=True).clamp(max=len(ends) - 1)
    position = places.context_lens.long()[sequence] - ends[sequence] + token
    last_block = (position // config.selection_block_size)[:, None, None]
    every = torch.arange(most, device=ends.device).expand_as(chosen)
    every = torch.where(every <= last_block, every, -1)
    block_indices.copy_(torch.where(last_block >= most, chosen, every))


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
    *,
    block_indices: Tensor | None = None,
) -> Tensor:
    """Gated sum of the three branches for every new token, [T, H, V].

    caches are k_cmp, v_cmp, k_slc, v_slc, k_win, v_win. Tokens past the last sequence, as a
    captured batch may have, get 0. block_indices [T, G, n] gets the selected blocks.
    """
    k_cmp, v_cmp, _, v_slc, _, _ = caches
    places = Places(page_table, window_page_table, cu_seqlens, context_lens)
    scratch = Scratch.allocate(q, v_slc, page_table.shape[1], plan, config)
    out = q.new_empty(*q.shape[:2], v_slc.shape[3])
    _compressed_parts(q, k_cmp, v_cmp, places, scratch, plan, config, scale)
    _chosen_parts(q, caches[2:], places, scratch, plan, config, scale)
    if block_indices is not None:
        _tell_blocks(scratch.chosen_blocks[:, :, 0], places, config, block_indices)
    merge_parts(
        scratch.partial_out, scratch.partial_lse, plan.splits, gates, out,
        cu_seqlens=cu_seqlens, early=early_start(q.device),
    )  # fmt: skip
    return out
