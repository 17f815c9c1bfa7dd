"""Rows and angles of new tokens and of the blocks that they complete: one launch.

A program takes some tokens, or some places for blocks. Which sequence they belong to is found by
asking all sequences at once: steps of a search would each wait for the one before.
"""

# Jitted functions and their launches have no types that a checker knows.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.new_rows import NewBlocks
from nsa_kernels.new_tokens import NewPlaces, NewTokens, most_new_blocks
from nsa_kernels.shapes import NsaConfig

_TILE = 16
# Sequences that are asked at once. One number for all: a server compiles one kernel.
_TILE_B = 64


def place_new_tokens(
    tokens: NewTokens,
    frequencies: Tensor,
    page_size: int,
    config: NsaConfig | None,
    is_rotated: bool,
    dtype: torch.dtype,
) -> NewPlaces:
    """Rows and angles of a step."""
    num_tokens, (num_sequences, num_pages) = len(tokens.positions), tokens.page_table.shape
    size, stride, num_blocks = 1, 1, 0
    if config is not None:
        size, stride = config.compression_block_size, config.compression_stride
        num_blocks = most_new_blocks(num_tokens, num_sequences, stride)
    half, device = len(frequencies), frequencies.device
    token_rows, window_rows = torch.empty(2, num_tokens, dtype=torch.int64, device=device)
    tail_rows = torch.empty(num_blocks, size, dtype=torch.int64, device=device)
    block_rows = torch.empty(num_blocks, dtype=torch.int64, device=device)
    cos, sin = torch.empty(2, num_tokens, half, dtype=dtype, device=device)
    block_cos, block_sin = torch.empty(2, num_blocks, half, dtype=dtype, device=device)
    token_tiles, block_tiles = triton.cdiv(num_tokens, _TILE), triton.cdiv(num_blocks, _TILE)
    window_page_table = tokens.window_page_table
    if token_tiles + block_tiles:
        paged_places_kernel[(token_tiles + block_tiles,)](
            tokens.positions, tokens.cu_seqlens, tokens.context_lens, tokens.page_table,
            tokens.page_table if window_page_table is None else window_page_table,
            tokens.shared_lens, frequencies,
            token_rows, window_rows, cos, sin, tail_rows, block_rows, block_cos, block_sin,
            num_tokens, num_blocks, num_sequences, num_pages, token_tiles,
            PAGE=page_size,
            HALF=half,
            HALF_PADDED=triton.next_power_of_2(half),
            SIZE=size,
            SIZE_PADDED=triton.next_power_of_2(size),
            STRIDE=stride,
            HAS_WINDOW=config is not None,
            TILE=_TILE,
            TILE_B=_TILE_B,
        )  # fmt: skip
    if config is None:
        return NewPlaces(token_rows, None, cos, sin, None)
    blocks = NewBlocks(tail_rows, block_rows, block_cos, block_sin, is_rotated)
    return NewPlaces(token_rows, window_rows, cos, sin, blocks)


@triton.jit
def pool_rows(page_table, i_sequence, position, mask, M, PAGE: tl.constexpr):
    """Pool row of each position; positions without a page share the scratch page 0."""
    logical = tl.minimum(position // PAGE, M - 1)
    page = tl.load(page_table + i_sequence.to(tl.int64) * M + logical, mask, 0)
    return tl.maximum(page, 0).to(tl.int64) * PAGE + position % PAGE


@triton.jit
def store_angles(
    cos,
    sin,
    frequencies,
    position,
    o_item,
    m_item,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
):
    """Cosines and sines of positions, by angles in fp64."""
    o_pair = tl.arange(0, HALF_PADDED)
    b_frequency = tl.load(frequencies + o_pair, o_pair < HALF, 0.0)
    b_angle = position.to(tl.float64)[:, None] * b_frequency[None, :]
    o_out = o_item.to(tl.int64)[:, None] * HALF + o_pair[None, :]
    m_out = m_item[:, None] & (o_pair < HALF)[None, :]
    tl.store(cos + o_out, tl.cos(b_angle).to(cos.dtype.element_ty), m_out)
    tl.store(sin + o_out, tl.sin(b_angle).to(sin.dtype.element_ty), m_out)


@triton.jit
def num_whole(length, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """Complete compression blocks of so many tokens."""
    return tl.where(length >= SIZE, (length - SIZE) // STRIDE + 1, 0)


@triton.jit
def new_and_old(
    cu_seqlens, context_lens, i_sequence, mask, SIZE: tl.constexpr, STRIDE: tl.constexpr
):
    """(blocks that sequences complete in this step, blocks that they had before)."""
    context = tl.load(context_lens + i_sequence, mask, 0)
    start = tl.load(cu_seqlens + i_sequence, mask, 0)
    end = tl.load(cu_seqlens + i_sequence + 1, mask, 0)
    before = num_whole(context - (end - start), SIZE, STRIDE)
    return num_whole(context, SIZE, STRIDE) - before, before


@triton.jit
def place_tokens(
    positions,
    cu_seqlens,
    page_table,
    window_page_table,
    shared_lens,
    frequencies,
    token_rows,
    window_rows,
    cos,
    sin,
    first_item,
    num_tokens,
    num_sequences,
    M,
    PAGE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    TILE_B: tl.constexpr,
):
    """Rows and angles of the tokens from first_item on."""
    o_item = first_item + tl.arange(0, TILE)
    m_item = o_item < num_tokens
    i_sequence = tl.zeros([TILE], tl.int32)
    for first in range(1, num_sequences, TILE_B):
        o_sequence = first + tl.arange(0, TILE_B)
        start = tl.load(cu_seqlens + o_sequence, o_sequence < num_sequences, num_tokens)
        i_sequence += tl.sum((start[None, :] <= o_item[:, None]).to(tl.int32), 1)
    i_sequence = tl.minimum(i_sequence, num_sequences - 1)
    position = tl.load(positions + o_item, m_item, 0)
    shared = tl.load(shared_lens + i_sequence, m_item, 0)
    row = pool_rows(page_table, i_sequence, position, m_item, M, PAGE)
    tl.store(token_rows + o_item, tl.where(position >= shared, row, 0), m_item)
    if HAS_WINDOW:
        window_row = pool_rows(window_page_table, i_sequence, position, m_item, M, PAGE)
        tl.store(window_rows + o_item, window_row, m_item)
    store_angles(cos, sin, frequencies, position, o_item, m_item, HALF, HALF_PADDED)


@triton.jit
def place_blocks(
    cu_seqlens,
    context_lens,
    page_table,
    window_page_table,
    shared_lens,
    frequencies,
    tail_rows,
    block_rows,
    cos,
    sin,
    first_item,
    num_blocks,
    num_sequences,
    M,
    PAGE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    STRIDE: tl.constexpr,
    TILE: tl.constexpr,
    TILE_B: tl.constexpr,
):
    """Rows and angles of the new blocks from first_item on."""
    o_item = first_item + tl.arange(0, TILE)
    m_item = o_item < num_blocks
    # The sequences whose blocks all lie before a place, and how many blocks those are.
    i_sequence = tl.zeros([TILE], tl.int32)
    num_before = tl.zeros([TILE], tl.int32)
    total = num_blocks * 0
    for first in range(0, num_sequences, TILE_B):
        o_sequence = first + tl.arange(0, TILE_B)
        m_sequence = o_sequence < num_sequences
        added, _ = new_and_old(cu_seqlens, context_lens, o_sequence, m_sequence, SIZE, STRIDE)
        reached = total + tl.cumsum(added, 0)
        is_before = m_sequence[None, :] & (reached[None, :] <= o_item[:, None])
        i_sequence += tl.sum(is_before.to(tl.int32), 1)
        num_before += tl.sum(tl.where(is_before, added[None, :], 0), 1)
        total += tl.sum(added, 0)
    is_block = m_item & (o_item < total)
    i_sequence = tl.minimum(i_sequence, num_sequences - 1)
    _, old = new_and_old(cu_seqlens, context_lens, i_sequence, is_block, SIZE, STRIDE)
    start = tl.where(is_block, (old + o_item - num_before) * STRIDE, 0)
    shared = tl.load(shared_lens + i_sequence, is_block, 0)
    row = pool_rows(page_table, i_sequence, start, is_block, M, PAGE) // STRIDE
    tl.store(block_rows + o_item, tl.where(is_block & (start >= shared), row, 0), m_item)
    o_member = tl.arange(0, SIZE_PADDED)
    m_member = is_block[:, None] & (o_member < SIZE)[None, :]
    member = start[:, None] + o_member[None, :]
    tail_row = pool_rows(window_page_table, i_sequence[:, None], member, m_member, M, PAGE)
    o_tail = o_item.to(tl.int64)[:, None] * SIZE + o_member[None, :]
    m_tail = m_item[:, None] & (o_member < SIZE)[None, :]
    tl.store(tail_rows + o_tail, tl.where(m_member, tail_row, 0), m_tail)
    store_angles(cos, sin, frequencies, start, o_item, m_item, HALF, HALF_PADDED)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "num_sequences", "M", "token_tiles"])
def paged_places_kernel(
    positions,
    cu_seqlens,
    context_lens,
    page_table,
    window_page_table,
    shared_lens,
    frequencies,
    token_rows,
    window_rows,
    cos,
    sin,
    tail_rows,
    block_rows,
    block_cos,
    block_sin,
    num_tokens,
    num_blocks,
    num_sequences,
    M,
    token_tiles,
    PAGE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    STRIDE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    TILE_B: tl.constexpr,
):
    """Write what NewPlaces holds; the programs of the tokens come first."""
    i_tile = tl.program_id(0)
    if i_tile < token_tiles:
        place_tokens(
            positions, cu_seqlens, page_table, window_page_table, shared_lens, frequencies,
            token_rows, window_rows, cos, sin, i_tile * TILE, num_tokens, num_sequences, M,
            PAGE, HALF, HALF_PADDED, HAS_WINDOW, TILE, TILE_B,
        )  # fmt: skip
    else:
        place_blocks(
            cu_seqlens, context_lens, page_table, window_page_table, shared_lens, frequencies,
            tail_rows, block_rows, block_cos, block_sin, (i_tile - token_tiles) * TILE,
            num_blocks, num_sequences, M,
            PAGE, HALF, HALF_PADDED, SIZE, SIZE_PADDED, STRIDE, TILE, TILE_B,
        )  # fmt: skip
