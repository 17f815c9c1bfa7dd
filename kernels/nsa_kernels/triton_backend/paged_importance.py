"""Importance of selection blocks for new tokens over paged compressed keys (Eq. 8-10).

A selection block j shares strides with the compressed blocks i = j * l'/d + offset, for offsets in
[1 - l/d, l'/d). A program holds a tile of selection blocks and walks through the offsets; at each
it scores the one compressed block of every selection block that stands at this offset. Every
selection block is so summed in the same order, and blocks with equal scores come out bit for bit
equal wherever they lie, which the rule for ties (the lower block) rests on.
"""

import triton
import triton.language as tl

from nsa_kernels.triton_backend.paged_parts import load_split, score_split
from nsa_kernels.triton_backend.tiles import visible_high


@triton.jit
def shared_strides(offset, BLOCK_STRIDES: tl.constexpr, SELECTION_STRIDES: tl.constexpr):
    """Strides shared by a selection block and the compressed block at `offset` from its start."""
    return tl.minimum(offset + BLOCK_STRIDES, SELECTION_STRIDES) - tl.maximum(offset, 0)


@triton.jit(do_not_specialize=["M", "SPLITS", "ALL_SPLITS"])
def paged_importance_kernel(
    q,
    k_cmp,
    page_table,
    row_sequences,
    row_positions,
    row_tokens,
    partial_lse,
    importance,
    scale_log2,
    G,
    M,
    S,
    SPLITS,
    ALL_SPLITS,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_TAIL: tl.constexpr,
    COMPRESSION_BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    SELECTION_BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    TILE_S: tl.constexpr,
):
    """Write importance [rows, G, S] of a tile of new tokens, one group, over paged keys.

    partial_lse [rows, H, ALL_SPLITS] holds the compressed branch's partial lse in its first SPLITS.
    Nothing is written while each query chooses every block it has.
    """
    TOKENS: tl.constexpr = TILE_ROWS // R_PADDED
    BLOCK_STRIDES: tl.constexpr = COMPRESSION_BLOCK // STRIDE
    SELECTION_STRIDES: tl.constexpr = SELECTION_BLOCK // STRIDE
    i_tile = tl.program_id(0)
    i_group = tl.program_id(2)
    first_block = tl.program_id(1) * TILE_S
    o_query = tl.arange(0, TILE_ROWS)
    o_row = i_tile.to(tl.int64) * TOKENS + o_query // R_PADDED
    o_r = o_query % R_PADDED
    position = tl.load(row_positions + o_row)
    m_query = (o_r < R) & (position >= 0)
    last_position = tl.max(position, 0)
    last_block = last_position // SELECTION_BLOCK
    if (last_position < 0) | (last_block < CHOSEN) | (first_block > last_block):
        return
    i_sequence = tl.load(row_sequences + i_tile * TOKENS).to(tl.int64)

    o_head = o_row * (G * R) + i_group * R + o_r
    p_partial = partial_lse + o_head * ALL_SPLITS
    largest = tl.full([TILE_ROWS], -float("inf"), tl.float32)
    for i_split in range(SPLITS):
        largest = tl.maximum(largest, tl.load(p_partial + i_split, m_query, -float("inf")))
    # Where no key was seen, or no head is, an lse of +inf makes every p 0.
    is_empty = largest == -float("inf")
    largest = tl.where(is_empty, 0.0, largest)
    total = tl.where(is_empty, 1.0, 0.0)
    for i_split in range(SPLITS):
        total += tl.exp(tl.load(p_partial + i_split, m_query, -float("inf")) - largest)
    b_lse = tl.where(is_empty, float("inf"), largest * 1.4426950408889634 + tl.log2(total))
    b_token = tl.load(row_tokens + o_row).to(tl.int64)
    b_q, b_q_tail = load_split(
        q, (b_token * (G * R) + i_group * R + o_r) * K, m_query, K, K_MAIN, K_TAIL
    )

    num_seen = visible_high(position, COMPRESSION_BLOCK, STRIDE)
    num_keys = visible_high(last_position, COMPRESSION_BLOCK, STRIDE)
    o_block = first_block + tl.arange(0, TILE_S)
    b_importance = tl.zeros([TOKENS, TILE_S], tl.float32)
    for step in range(BLOCK_STRIDES + SELECTION_STRIDES - 1):
        offset = step + 1 - BLOCK_STRIDES
        o_cmp = o_block * SELECTION_STRIDES + offset
        m_cmp = (o_cmp >= 0) & (o_cmp < num_keys)
        page = tl.load(page_table + i_sequence * M + o_cmp // PAGE_ROWS, m_cmp, 0).to(tl.int64)
        o_key = ((page * PAGE_ROWS + o_cmp % PAGE_ROWS) * G + i_group) * K
        b_k, b_k_tail = load_split(k_cmp, o_key, m_cmp, K, K_MAIN, K_TAIL)
        score = score_split(b_q, b_q_tail, b_k, b_k_tail, K_TAIL)
        b_p = tl.exp2(score * scale_log2 - b_lse[:, None])
        b_p = tl.where(m_cmp[None, :] & (o_cmp[None, :] < num_seen[:, None]), b_p, 0.0)
        weight = shared_strides(offset, BLOCK_STRIDES, SELECTION_STRIDES)
        b_importance += tl.sum(tl.reshape(b_p, [TOKENS, R_PADDED, TILE_S]), 1) * weight
    o_out = ((i_tile.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)) * G + i_group) * S
    p_out = importance + o_out[:, None] + o_block[None, :]
    tl.store(p_out, b_importance, (o_block < S)[None, :])
