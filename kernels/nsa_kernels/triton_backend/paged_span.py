"""Paged attention of new tokens over one contiguous span of keys: compressed and full.

A program takes one new token, one group and one part of the token's span. Parts are cut from the
span that the token really has, while their number comes from shapes alone, so that a captured graph
serves any context.
"""

import triton
import triton.language as tl

from nsa_kernels.triton_backend.paged_parts import attend_keys, load_split, store_partial
from nsa_kernels.triton_backend.tiles import visible_high


@triton.jit
def paged_span_forward_kernel(
    q,
    k,
    v,
    page_table,
    row_sequences,
    row_positions,
    partial_out,
    partial_lse,
    scale_log2,
    first_row,
    G,
    M,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_TAIL: tl.constexpr,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    ALL_SPLITS: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Attend to the keys i with i * STRIDE + BLOCK - 1 <= position: l, d compressed; 1, 1 full."""
    i_row = tl.program_id(0).to(tl.int64)
    i_group = tl.program_id(1)
    i_split = tl.program_id(2)
    position = tl.load(row_positions + first_row + i_row)
    if position < 0:
        return
    i_sequence = tl.load(row_sequences + first_row + i_row).to(tl.int64)
    num_keys = visible_high(position, BLOCK, STRIDE)

    o_r = tl.arange(0, R_PADDED)
    m_head = o_r < R
    o_head = i_row * (G * R) + i_group * R + o_r
    o_query = ((first_row + i_row) * (G * R) + i_group * R + o_r) * K
    b_q, b_q_tail = load_split(q, o_query, m_head, K, K_MAIN, K_TAIL)

    largest = tl.full([R_PADDED], -float("inf"), tl.float32)
    total = tl.zeros([R_PADDED], tl.float32)
    acc = tl.zeros([R_PADDED, V_PADDED], tl.float32)
    tiles_per_split = tl.cdiv(tl.cdiv(num_keys, TILE_K), SPLITS)
    first_key = i_split * tiles_per_split * TILE_K
    last_key = tl.minimum(first_key + tiles_per_split * TILE_K, num_keys)
    p_table = page_table + i_sequence * M
    for start in range(first_key, last_key, TILE_K):
        o_key = start + tl.arange(0, TILE_K)
        m_key = o_key < last_key
        page = tl.load(p_table + o_key // PAGE_ROWS, m_key, 0).to(tl.int64)
        o_row = (page * PAGE_ROWS + o_key % PAGE_ROWS) * G + i_group
        largest, total, acc = attend_keys(
            b_q, b_q_tail, k, v, o_row, m_key, largest, total, acc, scale_log2,
            K, K_MAIN, K_TAIL, V, V_PADDED,
        )  # fmt: skip
    store_partial(
        partial_out, partial_lse, o_head, m_head, i_split, largest, total, acc,
        ALL_SPLITS, V, V_PADDED,
    )  # fmt: skip
