"""Paged selected and sliding attention of new tokens, side by side in one launch.

A program takes one new token, one group and one part, either of the token's chosen blocks or of its
window. A chosen block is found through the page table: a page is a whole number of selection
blocks. The window has its own pool and its own table.
"""

import triton
import triton.language as tl

from nsa_kernels.triton_backend.paged_parts import attend_keys, load_split, store_partial
from nsa_kernels.triton_backend.tiles import visible_low


@triton.jit(do_not_specialize=["M", "SPLITS_CMP", "SPLITS_SLC", "SPLITS_WIN"])
def paged_selected_sliding_forward_kernel(
    q,
    k_slc,
    v_slc,
    k_win,
    v_win,
    block_indices,
    page_table,
    window_page_table,
    row_sequences,
    row_positions,
    row_tokens,
    partial_out,
    partial_lse,
    scale_log2,
    G,
    M,
    SPLITS_CMP,
    SPLITS_SLC,
    SPLITS_WIN,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_TAIL: tl.constexpr,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
    SELECTION_BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr,
    CHOSEN_PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Write the parts of the selected branch, then of the window, behind the compressed ones."""
    i_row = tl.program_id(0).to(tl.int64)
    i_group = tl.program_id(1)
    i_split = tl.program_id(2)
    position = tl.load(row_positions + i_row)
    if position < 0:
        return
    i_sequence = tl.load(row_sequences + i_row).to(tl.int64)
    i_token = tl.load(row_tokens + i_row).to(tl.int64)

    o_r = tl.arange(0, R_PADDED)
    m_head = o_r < R
    o_head = i_row * (G * R) + i_group * R + o_r
    o_query = (i_token * (G * R) + i_group * R + o_r) * K
    b_q, b_q_tail = load_split(q, o_query, m_head, K, K_MAIN, K_TAIL)

    largest = tl.full([R_PADDED], -float("inf"), tl.float32)
    total = tl.zeros([R_PADDED], tl.float32)
    acc = tl.zeros([R_PADDED, V_PADDED], tl.float32)
    if i_split < SPLITS_SLC:
        p_table = page_table + i_sequence * M
        p_chosen = block_indices + (i_row * G + i_group) * CHOSEN
        o_chosen = tl.arange(0, CHOSEN_PADDED)
        chosen = tl.load(p_chosen + o_chosen, o_chosen < CHOSEN, -1)
        num_slots = tl.sum((chosen >= 0).to(tl.int32), 0) * SELECTION_BLOCK
        slots_per_split = tl.cdiv(tl.cdiv(num_slots, TILE_K), SPLITS_SLC) * TILE_K
        first_slot = i_split * slots_per_split
        last_slot = tl.minimum(first_slot + slots_per_split, num_slots)
        for start in range(first_slot, last_slot, TILE_K):
            o_slot = start + tl.arange(0, TILE_K)
            m_slot = o_slot < last_slot
            block = tl.load(p_chosen + o_slot // SELECTION_BLOCK, m_slot, 0)
            o_key = block * SELECTION_BLOCK + o_slot % SELECTION_BLOCK
            m_key = m_slot & (o_key <= position)
            page = tl.load(p_table + o_key // PAGE_ROWS, m_key, 0).to(tl.int64)
            o_row = (page * PAGE_ROWS + o_key % PAGE_ROWS) * G + i_group
            largest, total, acc, _ = attend_keys(
                b_q, b_q_tail, k_slc, v_slc, o_row, m_key, m_key[None, :], largest, total, acc,
                scale_log2, K, K_MAIN, K_TAIL, V, V_PADDED,
            )  # fmt: skip
    else:
        p_table = window_page_table + i_sequence * M
        first_token = visible_low(position, WINDOW)
        num_tokens = position + 1 - first_token
        tokens_per_split = tl.cdiv(tl.cdiv(num_tokens, TILE_K), SPLITS_WIN) * TILE_K
        first_key = first_token + (i_split - SPLITS_SLC) * tokens_per_split
        last_key = tl.minimum(first_key + tokens_per_split, position + 1)
        for start in range(first_key, last_key, TILE_K):
            o_key = start + tl.arange(0, TILE_K)
            m_key = o_key < last_key
            page = tl.load(p_table + o_key // PAGE_ROWS, m_key, 0).to(tl.int64)
            o_row = (page * PAGE_ROWS + o_key % PAGE_ROWS) * G + i_group
            largest, total, acc, _ = attend_keys(
                b_q, b_q_tail, k_win, v_win, o_row, m_key, m_key[None, :], largest, total, acc,
                scale_log2, K, K_MAIN, K_TAIL, V, V_PADDED,
            )  # fmt: skip
    store_partial(
        partial_out, partial_lse, o_head, m_head, SPLITS_CMP + i_split, largest, total, acc,
        SPLITS_CMP + SPLITS_SLC + SPLITS_WIN, V, V_PADDED,
    )  # fmt: skip
