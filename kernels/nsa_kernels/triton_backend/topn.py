"""The n most important selection blocks of every query and group (Eq. 11), exact and in order.

An importance is a non-negative float, so its bits read as an integer keep its order. The n-th
largest of a row is found bit by bit from the top: 31 counts, whatever n is. What lies above it is
chosen, what equals it is chosen from the lowest block on, and a running count of the chosen gives
each its place, so that the output is ascending without a sort.
"""

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.shapes import NsaConfig

# Elements of one program's tile of importances: 32 registers a thread with four warps.
_TILE_ELEMENTS = 4096
_MAX_TILE_BLOCKS = 16384


@triton.jit
def rank_blocks(
    importance,
    carry,
    o_row,
    m_row,
    num_candidates,
    i_tile,
    S,
    CHOSEN,
    INITIAL,
    LOCAL,
    TILE_S: tl.constexpr,
):
    """Order-preserving integers [TILE_ROWS, TILE_S]: forced blocks highest, no candidate -1."""
    o_block = i_tile * TILE_S + tl.arange(0, TILE_S)
    m_candidate = m_row[:, None] & (o_block[None, :] < num_candidates[:, None])
    # With no more candidates than places, importances do not matter and were not computed.
    m_scored = m_candidate & (num_candidates > CHOSEN)[:, None]
    o_score = o_row[:, None] * S + o_block[None, :]
    b_importance = tl.load(importance + o_score, m_scored, 0.0)
    if carry is not None:
        b_importance += tl.load(carry + o_score - 1, m_scored & (o_block > 0)[None, :], 0.0)
    is_initial = o_block[None, :] < INITIAL
    is_local = o_block[None, :] >= num_candidates[:, None] - LOCAL
    keys = b_importance.to(tl.int32, bitcast=True)
    keys = tl.where(is_initial | is_local, 0x7FFFFFFF, keys)
    return tl.where(m_candidate, keys, -1)


@triton.jit
def top_blocks_kernel(
    importance,
    carry,
    row_positions,
    row_tokens,
    block_indices,
    num_rows,
    G,
    S,
    SELECTION_BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr,
    CHOSEN_PADDED: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_S: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Write block_indices [T, G, CHOSEN] of TILE_ROWS rows of importance [num_rows, G, S].

    row_positions holds each row's position in its sequence (-1: no row), row_tokens its packed
    token (None: the row's number). Blocks after the position's own are never read.
    """
    i_group = tl.program_id(1)
    o_query = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    b_position = tl.load(row_positions + o_query, o_query < num_rows, -1)
    m_row = b_position >= 0
    o_row = o_query * G + i_group
    num_candidates = tl.where(m_row, b_position // SELECTION_BLOCK + 1, 0)
    num_tiles = tl.cdiv(tl.max(num_candidates, 0), TILE_S)
    if ONE_TILE:
        keys = rank_blocks(
            importance, carry, o_row, m_row, num_candidates, 0, S, CHOSEN, INITIAL, LOCAL, TILE_S
        )

    threshold = tl.zeros([TILE_ROWS], tl.int32)
    bit = 1 << 30
    for _ in range(31):
        trial = threshold | bit
        if ONE_TILE:
            count = tl.sum((keys >= trial[:, None]).to(tl.int32), 1)
        else:
            count = tl.zeros([TILE_ROWS], tl.int32)
            for i_tile in range(0, num_tiles):
                tile = rank_blocks(
                    importance,
                    carry,
                    o_row,
                    m_row,
                    num_candidates,
                    i_tile,
                    S,
                    CHOSEN,
                    INITIAL,
                    LOCAL,
                    TILE_S,
                )
                count += tl.sum((tile >= trial[:, None]).to(tl.int32), 1)
        threshold = tl.where(count >= CHOSEN, trial, threshold)
        bit = bit // 2

    if ONE_TILE:
        above = tl.sum((keys > threshold[:, None]).to(tl.int32), 1)
    else:
        above = tl.zeros([TILE_ROWS], tl.int32)
        for i_tile in range(0, num_tiles):
            tile = rank_blocks(
                importance,
                carry,
                o_row,
                m_row,
                num_candidates,
                i_tile,
                S,
                CHOSEN,
                INITIAL,
                LOCAL,
                TILE_S,
            )
            above += tl.sum((tile > threshold[:, None]).to(tl.int32), 1)

    b_token = o_query
    if row_tokens is not None:
        b_token = tl.load(row_tokens + o_query, m_row, 0).to(tl.int64)
    p_out = block_indices + (b_token * G + i_group) * CHOSEN
    num_equal = tl.zeros([TILE_ROWS], tl.int32)
    num_chosen = tl.zeros([TILE_ROWS], tl.int32)
    for i_tile in range(0, num_tiles):
        if ONE_TILE:
            tile = keys
        else:
            tile = rank_blocks(
                importance,
                carry,
                o_row,
                m_row,
                num_candidates,
                i_tile,
                S,
                CHOSEN,
                INITIAL,
                LOCAL,
                TILE_S,
            )
        equal = tile == threshold[:, None]
        equal_before = num_equal[:, None] + tl.cumsum(equal.to(tl.int32), 1)
        chosen = (tile > threshold[:, None]) | (equal & (above[:, None] + equal_before <= CHOSEN))
        place = num_chosen[:, None] + tl.cumsum(chosen.to(tl.int32), 1) - 1
        o_block = i_tile * TILE_S + tl.arange(0, TILE_S)
        tl.store(p_out[:, None] + place, o_block[None, :] + tl.zeros_like(place), chosen)
        num_equal += tl.sum(equal.to(tl.int32), 1)
        num_chosen += tl.sum(chosen.to(tl.int32), 1)

    o_chosen = tl.arange(0, CHOSEN_PADDED)
    m_absent = (o_chosen[None, :] >= num_chosen[:, None]) & (o_chosen[None, :] < CHOSEN)
    tl.store(
        p_out[:, None] + o_chosen[None, :],
        tl.full([TILE_ROWS, CHOSEN_PADDED], -1, tl.int32),
        m_absent & m_row[:, None],
    )


def top_blocks(
    importance: Tensor,
    row_positions: Tensor,
    row_tokens: Tensor | None,
    block_indices: Tensor,
    config: NsaConfig,
    *,
    carry: Tensor | None = None,
) -> None:
    """Write the chosen blocks of every row of `importance` into `block_indices`.

    Args:
        importance: fp32 [rows, G, S]; entry j of a row is read only for j <= position // l', and
            only where these candidates are more than n.
        row_positions: int32 [rows], position of the row's query in its sequence, -1 for no query.
        row_tokens: int32 [rows], the query's packed token: where its blocks are written; None:
            the row's own number.
        block_indices: int32 [T, G, n], ascending, -1 last.
        carry: fp32 like importance; entry j belongs to block j + 1, whose importance it adds to.

    Source:
        arXiv 2502.11089, Eq. 11; forced blocks section 4.1; ties go to the lower block.
    """
    num_rows, num_groups, num_blocks = importance.shape
    if num_rows == 0:
        return
    tile_blocks = min(_MAX_TILE_BLOCKS, max(16, triton.next_power_of_2(num_blocks)))
    tile_rows = max(1, _TILE_ELEMENTS // tile_blocks)
    chosen = config.num_selected_blocks
    top_blocks_kernel[(triton.cdiv(num_rows, tile_rows), num_groups)](
        importance,
        carry,
        row_positions,
        row_tokens,
        block_indices,
        num_rows,
        num_groups,
        num_blocks,
        SELECTION_BLOCK=config.selection_block_size,
        CHOSEN=chosen,
        CHOSEN_PADDED=triton.next_power_of_2(chosen),
        INITIAL=config.num_initial_blocks,
        LOCAL=config.num_local_blocks,
        TILE_ROWS=tile_rows,
        TILE_S=tile_blocks,
        ONE_TILE=num_blocks <= _MAX_TILE_BLOCKS,
        num_warps=4 if tile_blocks <= _TILE_ELEMENTS else 8,
    )
