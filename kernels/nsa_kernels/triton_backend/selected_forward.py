"""Attention over the n selection blocks that a token's group chose, forward.

A program holds one token with the R heads of one group, which share their choice, and walks the
chosen blocks (arXiv 2502.11089, section 3.4). Tokens run fastest in the grid, so that programs at
work at the same time are neighbours of one group and find each other's blocks in L2.
"""

# Jitted functions and their launches have no types that a checker knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.shapes import NsaConfig
from nsa_kernels.triton_backend.tiles import (
    LN_2,
    Tiles,
    find_token_sequence,
    fp32_tiles,
    key_widths,
    load_rows,
    log2_scale,
    store_rows,
    value_widths,
)


def selected_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    config: NsaConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [T, H, V] and natural lse [T, H]; block_indices int32 [T, G, n], any order, -1 none."""
    num_tokens, num_heads, key_width = q.shape
    _, num_groups, value_width = v.shape
    out = q.new_empty(num_tokens, num_heads, value_width)
    lse = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=q.device)
    if num_tokens == 0:
        return out, lse
    heads_per_group = num_heads // num_groups
    block = config.selection_block_size
    tiles = selected_tiles(q.dtype, key_width, value_width, heads_per_group, block)
    num_choices = block_indices.shape[-1]
    selected_forward_kernel[(num_tokens, num_groups)](
        q,
        k,
        v,
        block_indices,
        out,
        lse,
        cu_seqlens,
        cu_seqlens.numel() - 1,
        log2_scale(scale),
        G=num_groups,
        R=heads_per_group,
        N=num_choices,
        N_PADDED=triton.next_power_of_2(num_choices),
        SELECTION_BLOCK=block,
        **key_widths(key_width),
        **value_widths(value_width),
        PRECISION=tiles.precision,
        TILE_ROWS=tiles.rows,
        TILE_KEYS=tiles.keys,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out, lse


def block_tile_keys(selection_block: int) -> int:
    """Keys of a tile inside a selection block: a power of two that tl.dot takes, at most 64."""
    return int(min(64, max(16, triton.next_power_of_2(selection_block))))


def selected_tiles(
    dtype: torch.dtype, key_width: int, value_width: int, heads_per_group: int, block: int
) -> Tiles:
    """Tile sizes of the query-major passes. tl.dot wants 16 rows: fewer heads are padded.

    16 rows feed one warp; a second one shares the accumulators of wide heads. Two stages keep the
    shared memory of a program small, so that many run on a multiprocessor and hide each other's
    waits for L2, which bounds these passes.
    """
    rows = max(16, triton.next_power_of_2(heads_per_group))
    keys = block_tile_keys(block)
    if dtype == torch.float32:
        tiles = fp32_tiles(key_width, value_width, rows)
        return replace(tiles, keys=min(keys, tiles.keys))
    num_warps = rows // 16 * (1 if max(key_width, value_width) <= 128 else 2)
    return Tiles(rows, keys, num_warps, 2)


@triton.jit
def count_choices(p_choice, N: tl.constexpr, N_PADDED: tl.constexpr):
    """Choices to walk: up to the last one that is not -1, so that trailing ones cost nothing."""
    o_choice = tl.arange(0, N_PADDED)
    b_choice = tl.load(p_choice + o_choice, mask=o_choice < N, other=-1)
    return tl.max(tl.where(b_choice >= 0, o_choice + 1, 0), 0)


@triton.jit
def chosen_keys(p_choice, i_tile, position, SELECTION_BLOCK: tl.constexpr, TILE_KEYS: tl.constexpr):
    """(first key, which keys are seen) of the i_tile-th key tile of a token's choices."""
    TILES: tl.constexpr = (SELECTION_BLOCK + TILE_KEYS - 1) // TILE_KEYS
    i_block = tl.load(p_choice + i_tile // TILES)
    o_block = i_tile % TILES * TILE_KEYS + tl.arange(0, TILE_KEYS)
    first = i_block * SELECTION_BLOCK + i_tile % TILES * TILE_KEYS
    m_key = (i_block >= 0) & (i_block * SELECTION_BLOCK + o_block <= position)
    if SELECTION_BLOCK % TILE_KEYS != 0:
        m_key = m_key & (o_block < SELECTION_BLOCK)
    return first, m_key


@triton.jit(do_not_specialize=["num_sequences"])
def selected_forward_kernel(
    q,
    k,
    v,
    block_indices,
    out,
    lse,
    cu_seqlens,
    num_sequences,
    scale_log2,
    G: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    N_PADDED: tl.constexpr,
    SELECTION_BLOCK: tl.constexpr,
    K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_TAIL: tl.constexpr,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out and lse of the heads of one group at one token."""
    i_token = tl.program_id(0)
    i_group = tl.program_id(1)
    i_sequence = find_token_sequence(cu_seqlens, num_sequences, i_token)
    start = tl.load(cu_seqlens + i_sequence)
    position = i_token - start
    o_row = tl.arange(0, TILE_ROWS)
    m_row = o_row < R
    row = (i_token.to(tl.int64) * G + i_group) * R
    p_choice = block_indices + (i_token.to(tl.int64) * G + i_group) * N

    b_q = load_rows(q + row * K, o_row * K, m_row, 0, K_MAIN, K, True)
    b_q_tail = b_q
    if K_TAIL > 0:
        b_q_tail = load_rows(q + row * K, o_row * K, m_row, K_MAIN, K_TAIL, K, True)
    b_out = tl.zeros([TILE_ROWS, V_PADDED], tl.float32)
    b_max = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([TILE_ROWS], tl.float32)

    o_tile = tl.arange(0, TILE_KEYS)
    TILES: tl.constexpr = (SELECTION_BLOCK + TILE_KEYS - 1) // TILE_KEYS
    for i_tile in range(0, count_choices(p_choice, N, N_PADDED) * TILES):
        first, m_key = chosen_keys(p_choice, i_tile, position, SELECTION_BLOCK, TILE_KEYS)
        key_row = (start + first).to(tl.int64) * G + i_group
        p_k = k + key_row * K
        b_k = load_rows(p_k, o_tile * (G * K), m_key, 0, K_MAIN, K, True)
        b_logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if K_TAIL > 0:
            b_k_tail = load_rows(p_k, o_tile * (G * K), m_key, K_MAIN, K_TAIL, K, True)
            b_logits = tl.dot(b_q_tail, tl.trans(b_k_tail), b_logits, input_precision=PRECISION)
        b_logits = tl.where(m_key[None, :], b_logits, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_logits, 1) * scale_log2)
        # As long as no key was seen, -inf - -inf would come up.
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2(b_logits * scale_log2 - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_v = load_rows(v + key_row * V, o_tile * (G * V), m_key, 0, V_PADDED, V, True)
        b_out = b_out * b_decay[:, None]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision=PRECISION)
        b_max = b_new_max

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    store_rows(out + row * V, b_out / b_sum[:, None], o_row * V, m_row, 0, V_PADDED, V)
    tl.store(lse + row + o_row, (b_max + tl.log2(b_sum)) * LN_2, mask=m_row)
