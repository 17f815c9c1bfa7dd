"""Compressed attention of few new tokens over pages, with what the choice of blocks needs.

A program takes a tile of new tokens of one sequence, one group and one part of the compressed keys.
Beside its part of the branch it leaves, for each head, how much every selection block weighs
against the maximum that the head had by then (Eq. 9 before the sum over heads, Eq. 10): no second
pass over the keys is needed once all parts are known.

Most of the keys are as old as the steps before: they are asked for before the launch before this
one has ended, and only the queries wait for it.
"""

import triton
import triton.language as tl

from nsa_kernels.triton_backend.paged_parts import attend_keys, load_split, store_partial
from nsa_kernels.triton_backend.paged_rows import find_new_tokens
from nsa_kernels.triton_backend.tiles import (
    EARLY_BLOCKS,
    await_launch,
    let_next_start,
    visible_high,
)


@triton.jit
def block_shares(
    b_p,
    TILE_ROWS: tl.constexpr,
    TILE_S: tl.constexpr,
    BLOCK_STRIDES: tl.constexpr,
    SELECTION_STRIDES: tl.constexpr,
    STRIDES_PADDED: tl.constexpr,
):
    """(share, rest) [TILE_ROWS, TILE_S] of probabilities [TILE_ROWS, TILE_S * STRIDES_PADDED].

    A compressed block counts with the strides that it shares with a selection block: the one in
    which it starts and, with what reaches beyond, the next. The rest is what goes beyond; the
    rests but for the last one are in the shares already.
    """
    b_p = tl.reshape(b_p, [TILE_ROWS, TILE_S, STRIDES_PADDED])
    o_stride = tl.arange(0, STRIDES_PADDED)
    own = tl.minimum(o_stride + BLOCK_STRIDES, SELECTION_STRIDES) - o_stride
    share = tl.sum(b_p * own[None, None, :], 2)
    beyond = tl.maximum(o_stride + BLOCK_STRIDES - SELECTION_STRIDES, 0)
    rest = tl.sum(b_p * beyond[None, None, :], 2)
    o_block = tl.arange(0, TILE_S)[None, :] + tl.zeros([TILE_ROWS, TILE_S], tl.int32)
    before = tl.gather(rest, tl.maximum(o_block - 1, 0), 1)
    return share + tl.where(o_block > 0, before, 0.0), rest


@triton.jit
def await_then_let_start(STARTS_EARLY: tl.constexpr):
    """In this order: the launch after this one reads the window without waiting for this one."""
    await_launch(STARTS_EARLY)
    let_next_start(STARTS_EARLY)


@triton.jit(do_not_specialize=["num_sequences", "M", "SPLITS", "ALL_SPLITS"])
def paged_compressed_kernel(
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
    scale_log2,
    num_sequences,
    G,
    M,
    N,
    SPLITS,
    ALL_SPLITS,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_TAIL: tl.constexpr,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
    COMPRESSION_BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    SELECTION_BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    TILE_S: tl.constexpr,
    STRIDES_PADDED: tl.constexpr,
    TILE_B: tl.constexpr,
    STARTS_EARLY: tl.constexpr,
):
    """Write the first parts of partial_out [T, H, ALL_SPLITS, V] and partial_lse.

    Key tiles hold TILE_S selection blocks; shares [T, H, N, TILE_S], rests and maxima [T, H, N]
    are written for those tiles that have a key, where queries choose at all.
    """
    TOKENS: tl.constexpr = TILE_ROWS // R_PADDED
    SELECTION_STRIDES: tl.constexpr = SELECTION_BLOCK // STRIDE
    TILE_STRIDES: tl.constexpr = TILE_S * SELECTION_STRIDES
    TILE_K: tl.constexpr = TILE_S * STRIDES_PADDED
    i_group = tl.program_id(0) % G
    i_split = tl.program_id(1)
    i_sequence, first_token, first_position, count = find_new_tokens(
        cu_seqlens, context_lens, num_sequences, tl.program_id(0) // G, TOKENS, TILE_B
    )
    if count <= 0:
        await_then_let_start(STARTS_EARLY)
        return
    last_position = first_position + count - 1
    num_keys = visible_high(last_position, COMPRESSION_BLOCK, STRIDE)
    num_tiles = tl.cdiv(num_keys, TILE_STRIDES)
    first_tile = i_split * num_tiles // SPLITS
    last_tile = (i_split + 1) * num_tiles // SPLITS

    o_query = tl.arange(0, TILE_ROWS)
    o_token = o_query // R_PADDED
    o_r = o_query % R_PADDED
    m_query = (o_r < R) & (o_token < count)
    o_head = (first_token.to(tl.int64) + o_token) * (G * R) + i_group * R + o_r
    num_seen = visible_high(first_position + o_token, COMPRESSION_BLOCK, STRIDE)
    largest = tl.full([TILE_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    acc = tl.zeros([TILE_ROWS, V_PADDED], tl.float32)

    o_column = tl.arange(0, TILE_K)
    o_stride = o_column % STRIDES_PADDED
    o_in_tile = o_column // STRIDES_PADDED * SELECTION_STRIDES + o_stride
    m_column = o_stride < SELECTION_STRIDES
    o_block = tl.arange(0, TILE_S)
    is_chosen_from = last_position // SELECTION_BLOCK >= CHOSEN
    m_share = m_query & is_chosen_from
    p_table = page_table + i_sequence.to(tl.int64) * M
    last = tl.load(context_lens + i_sequence) - 1
    num_old = visible_high(last, COMPRESSION_BLOCK, STRIDE) - EARLY_BLOCKS
    if last_tile * TILE_STRIDES > num_old:
        await_launch(STARTS_EARLY)
    b_q = tl.zeros([TILE_ROWS, K_MAIN], q.dtype.element_ty)
    b_q_tail = b_q
    if K_TAIL > 0:
        b_q_tail = tl.zeros([TILE_ROWS, K_TAIL], q.dtype.element_ty)
    # Page numbers are asked for one tile ahead: keys and values need not wait for them.
    o_key = first_tile * TILE_STRIDES + o_in_tile
    page = tl.load(p_table + o_key // PAGE_ROWS, m_column & (o_key < num_keys), 0)
    for i_tile in range(first_tile, last_tile):
        o_key = i_tile * TILE_STRIDES + o_in_tile
        m_key = m_column & (o_key < num_keys)
        # In the loop, whose first keys are under way by then.
        if i_tile == first_tile:
            await_then_let_start(STARTS_EARLY)
            b_q, b_q_tail = load_split(q, o_head * K, m_query, K, K_MAIN, K_TAIL)
        o_cache = (page.to(tl.int64) * PAGE_ROWS + o_key % PAGE_ROWS) * G + i_group
        o_next = o_key + TILE_STRIDES
        page = tl.load(p_table + o_next // PAGE_ROWS, m_column & (o_next < num_keys), 0)
        seen = m_key[None, :] & (o_key[None, :] < num_seen[:, None])
        largest, total, acc, b_p = attend_keys(
            b_q, b_q_tail, k_cmp, v_cmp, o_cache, m_key, seen, largest, total, acc, scale_log2,
            K, K_MAIN, K_TAIL, V, V_PADDED,
        )  # fmt: skip
        share, rest = block_shares(
            b_p, TILE_ROWS, TILE_S, COMPRESSION_BLOCK // STRIDE, SELECTION_STRIDES, STRIDES_PADDED
        )
        o_tile = o_head * N + i_tile
        tl.store(shares + o_tile[:, None] * TILE_S + o_block[None, :], share, m_share[:, None])
        p_rest = rests + o_tile[:, None] + o_block[None, :] * 0
        tl.store(p_rest, rest, m_share[:, None] & (o_block == TILE_S - 1)[None, :])
        tl.store(maxima + o_tile, largest, m_share)
    if first_tile == last_tile:
        await_then_let_start(STARTS_EARLY)
    store_partial(
        partial_out, partial_lse, o_head, m_query, i_split, largest, total, acc,
        ALL_SPLITS, V, V_PADDED,
    )  # fmt: skip
