"""Paged attention of new tokens over one span of keys: compressed and full.

A program takes a tile of new tokens of one sequence, one group and one part of the span. Parts are
cut from the span that the tile really has, while their number comes from shapes alone, so that a
captured graph serves any context.
"""

import triton
import triton.language as tl

from nsa_kernels.triton_backend.paged_parts import attend_keys, load_split, store_partial
from nsa_kernels.triton_backend.tiles import visible_high


@triton.jit(do_not_specialize=["M", "SPLITS", "ALL_SPLITS"])
def paged_span_forward_kernel(
    q,
    k,
    v,
    page_table,
    row_sequences,
    row_positions,
    row_tokens,
    partial_out,
    partial_lse,
    scale_log2,
    G,
    M,
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
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Attend to the keys i with i * STRIDE + BLOCK - 1 <= position: l, d compressed; 1, 1 full.

    The queries of a program are head r % R_PADDED of row r // R_PADDED of its tile.
    """
    TOKENS: tl.constexpr = TILE_ROWS // R_PADDED
    i_tile = tl.program_id(0)
    i_group = tl.program_id(1)
    i_split = tl.program_id(2)
    o_query = tl.arange(0, TILE_ROWS)
    o_row = i_tile.to(tl.int64) * TOKENS + o_query // R_PADDED
    o_r = o_query % R_PADDED
    position = tl.load(row_positions + o_row)
    m_query = (o_r < R) & (position >= 0)
    last_position = tl.max(position, 0)
    if last_position < 0:
        return
    i_sequence = tl.load(row_sequences + i_tile * TOKENS).to(tl.int64)
    num_seen = visible_high(position, BLOCK, STRIDE)
    num_keys = visible_high(last_position, BLOCK, STRIDE)

    o_head = o_row * (G * R) + i_group * R + o_r
    b_token = tl.load(row_tokens + o_row).to(tl.int64)
    b_q, b_q_tail = load_split(
        q, (b_token * (G * R) + i_group * R + o_r) * K, m_query, K, K_MAIN, K_TAIL
    )
    largest = tl.full([TILE_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    acc = tl.zeros([TILE_ROWS, V_PADDED], tl.float32)
    keys_per_split = tl.cdiv(tl.cdiv(num_keys, TILE_K), SPLITS) * TILE_K
    first_key = i_split * keys_per_split
    last_key = tl.minimum(first_key + keys_per_split, num_keys)
    p_table = page_table + i_sequence * M
    for start in range(first_key, last_key, TILE_K):
        o_key = start + tl.arange(0, TILE_K)
        m_key = o_key < last_key
        page = tl.load(p_table + o_key // PAGE_ROWS, m_key, 0).to(tl.int64)
        o_cache = (page * PAGE_ROWS + o_key % PAGE_ROWS) * G + i_group
        seen = m_key[None, :] & (o_key[None, :] < num_seen[:, None])
        largest, total, acc, _ = attend_keys(
            b_q, b_q_tail, k, v, o_cache, m_key, seen, largest, total, acc, scale_log2,
            K, K_MAIN, K_TAIL, V, V_PADDED,
        )  # fmt: skip
    store_partial(
        partial_out, partial_lse, o_head, m_query, i_split, largest, total, acc,
        ALL_SPLITS, V, V_PADDED,
    )  # fmt: skip
