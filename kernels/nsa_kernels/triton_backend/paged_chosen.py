"""Choice of blocks, selected attention and sliding attention of new tokens, in one launch.

A program takes one new token, one group and one part, of the token's chosen blocks or of its
window. Every program of the selected branch makes the choice for itself: that costs some reading
from the L2 cache, where a launch for it would cost more. Those of the window need not wait for the
compressed branch at all.
"""

import triton
import triton.language as tl

from nsa_kernels.triton_backend.paged_choice import choose_blocks
from nsa_kernels.triton_backend.paged_parts import attend_keys, load_split, store_partial
from nsa_kernels.triton_backend.paged_rows import find_new_tokens
from nsa_kernels.triton_backend.tiles import (
    await_launch,
    let_next_start,
    visible_high,
    visible_low,
)


@triton.jit
def cut_tiles(num_blocks, i_part, PARTS, SELECTION_BLOCK: tl.constexpr, TILE_K: tl.constexpr):
    """(first, end) of the i_part-th of PARTS even parts of num_blocks blocks, in tiles of keys."""
    num_tiles = tl.cdiv(num_blocks * SELECTION_BLOCK, TILE_K)
    return i_part * num_tiles // PARTS, (i_part + 1) * num_tiles // PARTS


@triton.jit
def find_slots(
    p_chosen,
    p_table,
    o_slot,
    first_block,
    num_listed,
    is_listed,
    low,
    position,
    SELECTION_BLOCK: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
):
    """(key, whether it is seen, physical page) of places in a list of num_listed blocks.

    The list is in memory if is_listed; else it is the blocks from first_block on.
    """
    o_listed = o_slot // SELECTION_BLOCK
    m_listed = o_listed < num_listed
    block = tl.load(p_chosen + o_listed, m_listed & is_listed, 0)
    block = tl.where(is_listed, block, first_block + o_listed)
    o_key = block * SELECTION_BLOCK + o_slot % SELECTION_BLOCK
    m_key = m_listed & (o_key >= low) & (o_key <= position)
    return o_key, m_key, tl.load(p_table + o_key // PAGE_ROWS, m_key, 0)


@triton.jit
def attend_list(
    b_q,
    b_q_tail,
    k,
    v,
    p_chosen,
    p_table,
    first_tile,
    last_tile,
    first_block,
    num_listed,
    is_listed,
    low,
    position,
    scale_log2,
    i_group,
    G,
    SELECTION_BLOCK: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    TILE_K: tl.constexpr,
    R_PADDED: tl.constexpr,
    K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_TAIL: tl.constexpr,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
):
    """(maximum, total, acc) over the tiles of keys from first_tile on of a list of blocks.

    find_slots says what the list is.
    """
    largest = tl.full([R_PADDED], -float("inf"), tl.float32)
    total = tl.zeros([R_PADDED], tl.float32)
    acc = tl.zeros([R_PADDED, V_PADDED], tl.float32)
    o_slot = first_tile * TILE_K + tl.arange(0, TILE_K)
    o_key, m_key, page = find_slots(
        p_chosen, p_table, o_slot, first_block, num_listed, is_listed, low, position,
        SELECTION_BLOCK, PAGE_ROWS,
    )  # fmt: skip
    for _ in range(first_tile, last_tile):
        o_cache = (page.to(tl.int64) * PAGE_ROWS + o_key % PAGE_ROWS) * G + i_group
        m_cache = m_key
        # Pages are asked for one tile ahead: keys and values need not wait for them.
        o_slot += TILE_K
        o_key, m_key, page = find_slots(
            p_chosen, p_table, o_slot, first_block, num_listed, is_listed, low, position,
            SELECTION_BLOCK, PAGE_ROWS,
        )  # fmt: skip
        largest, total, acc, _ = attend_keys(
            b_q, b_q_tail, k, v, o_cache, m_cache, m_cache[None, :], largest, total, acc,
            scale_log2, K, K_MAIN, K_TAIL, V, V_PADDED,
        )  # fmt: skip
    return largest, total, acc


@triton.jit(do_not_specialize=["num_sequences", "M", "SPLITS_CMP", "SPLITS_SLC", "SPLITS_WIN"])
def paged_chosen_kernel(
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
    scale_log2,
    num_sequences,
    G,
    M,
    N,
    SPLITS_CMP,
    SPLITS_SLC,
    SPLITS_WIN,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    R_CHOICE: tl.constexpr,
    K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_TAIL: tl.constexpr,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
    COMPRESSION_BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    SELECTION_BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_S: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_B: tl.constexpr,
    STARTS_EARLY: tl.constexpr,
):
    """Write the parts of partial_out [T, H, ALL_SPLITS, V] and partial_lse after the compressed.

    The programs of the window come first: they run while the compressed branch still does.

    shares, rests, maxima: as paged_compressed_kernel leaves them; importance [T, G, SPLITS_SLC, N,
    TILE_S] and chosen_blocks [T, G, SPLITS_SLC, CHOSEN] are room for the choice.
    """
    let_next_start(STARTS_EARLY)
    ALL_SPLITS = SPLITS_CMP + SPLITS_SLC + SPLITS_WIN
    i_group = tl.program_id(0) % G
    i_split = tl.program_id(1)
    i_sequence, i_token, position, count = find_new_tokens(
        cu_seqlens, context_lens, num_sequences, tl.program_id(0) // G, 1, TILE_B
    )
    if count <= 0:
        return
    first_head = i_token.to(tl.int64) * (G * R) + i_group * R
    o_r = tl.arange(0, R_PADDED)
    m_head = o_r < R
    o_head = first_head + o_r
    b_q, b_q_tail = load_split(q, o_head * K, m_head, K, K_MAIN, K_TAIL)

    # Keys lie in a list of blocks: the chosen ones, or those that the window touches.
    is_window = i_split < SPLITS_WIN
    i_chosen = tl.maximum(i_split - SPLITS_WIN, 0)
    i_part = SPLITS_CMP + tl.where(is_window, SPLITS_SLC + i_split, i_chosen)
    last_block = position // SELECTION_BLOCK
    i_choice = (i_token.to(tl.int64) * G + i_group) * SPLITS_SLC + i_chosen
    p_chosen = chosen_blocks + i_choice * CHOSEN
    if is_window:
        low = visible_low(position, WINDOW)
        first_block = low // SELECTION_BLOCK
        num_listed = last_block + 1 - first_block
        first_tile, last_tile = cut_tiles(num_listed, i_split, SPLITS_WIN, SELECTION_BLOCK, TILE_K)
        p_table = window_page_table
        k, v = k_win, v_win
    else:
        low = position * 0
        first_block = low
        num_listed = tl.minimum(last_block + 1, CHOSEN)
        first_tile, last_tile = cut_tiles(num_listed, i_chosen, SPLITS_SLC, SELECTION_BLOCK, TILE_K)
        await_launch(STARTS_EARLY)
        if last_block >= CHOSEN:
            choose_blocks(
                shares, rests, maxima, partial_lse, importance + i_choice * N * TILE_S, p_chosen,
                first_head, visible_high(position, COMPRESSION_BLOCK, STRIDE), last_block + 1, N,
                SPLITS_CMP, ALL_SPLITS, R, R_CHOICE, TILE_N, TILE_S,
                TILE_S * (SELECTION_BLOCK // STRIDE), SPLITS_PADDED,
                R * (COMPRESSION_BLOCK // STRIDE), CHOSEN, INITIAL, LOCAL, NUM_BLOCKS,
            )  # fmt: skip
        p_table = page_table
        k, v = k_slc, v_slc
    is_listed = (is_window == 0) & (last_block >= CHOSEN)
    p_table += i_sequence.to(tl.int64) * M
    largest, total, acc = attend_list(
        b_q, b_q_tail, k, v, p_chosen, p_table, first_tile, last_tile, first_block, num_listed,
        is_listed, low, position, scale_log2, i_group, G,
        SELECTION_BLOCK, PAGE_ROWS, TILE_K, R_PADDED, K, K_MAIN, K_TAIL, V, V_PADDED,
    )  # fmt: skip
    store_partial(
        partial_out, partial_lse, o_head, m_head, i_part, largest, total, acc,
        ALL_SPLITS, V, V_PADDED,
    )  # fmt: skip
