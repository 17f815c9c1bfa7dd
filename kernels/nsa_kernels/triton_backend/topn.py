"""The n most important selection blocks of every query and group (Eq. 11), exact and in order.

An importance is a non-negative float, so its bits read as an integer keep its order. The least
chosen of a row is found by halving the range between the row's least and greatest, which ends as
soon as the count above the middle is exact: about ten counts, whatever n is. What lies above it is
chosen, what equals it is chosen from the lowest block on, and a running count of the chosen gives
each its place, so that the output is ascending without a sort. A row belongs to one warp as long as
it fits into its registers: no count waits for another warp.
"""

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.shapes import NsaConfig

_MAX_TILE_BLOCKS = 16384
# Blocks of a row in one warp: 32 registers a thread.
_WARP_BLOCKS = 1024
# Rows narrower than this are not worth a tile of their own width.
_LEAST_TILE_BLOCKS = 128


@triton.jit
def rank_blocks(
    importance,
    carry,
    num_candidates,
    i_tile,
    S,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    TILE_S: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
):
    """Order-preserving integers [TILE_S] of one row's free candidates; -1 for all other blocks."""
    o_block = i_tile * TILE_S + tl.arange(0, TILE_S)
    end = num_candidates - LOCAL
    if IS_ALIGNED:
        # Whole vectors: what is read past the candidates is not used.
        m_read = o_block < (end + 15) // 16 * 16
    else:
        m_read = o_block < end
    b_importance = tl.load(importance + o_block, m_read, 0.0)
    if carry is not None:
        b_importance += tl.where(o_block > 0, tl.load(carry + o_block, m_read, 0.0), 0.0)
    # NaN counts as infinite: no key may be above the search's upper end.
    keys = tl.minimum(tl.maximum(b_importance.to(tl.int32, bitcast=True), 0), 0x7F800000)
    return tl.where((o_block >= INITIAL) & (o_block < end), keys, -1)


@triton.jit
def count_from(
    keys,
    bound,
    importance,
    carry,
    num_candidates,
    num_tiles,
    S,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    TILE_S: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """How many keys of a row are at least bound; its only tile is given, others are read again."""
    if ONE_TILE:
        count = tl.sum((keys >= bound).to(tl.int32), 0)
    else:
        count = num_tiles * 0
        for i_tile in range(0, num_tiles):
            tile = rank_blocks(
                importance, carry, num_candidates, i_tile, S, INITIAL, LOCAL, TILE_S, IS_ALIGNED
            )
            count += tl.sum((tile >= bound).to(tl.int32), 0)
    return count


@triton.jit
def choose_free_blocks(
    importance,
    carry,
    p_out,
    num_candidates,
    S,
    FREE: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    TILE_S: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Write the FREE most important free candidates of one row, ascending; it has more of them."""
    num_tiles = tl.cdiv(num_candidates, TILE_S)
    keys = rank_blocks(importance, carry, num_candidates, 0, S, INITIAL, LOCAL, TILE_S, IS_ALIGNED)
    # The least chosen is in [low, high): `count` keys reach low, `above` reach high.
    low = num_candidates * 0
    high = tl.max(keys, 0) + 1
    if ONE_TILE:
        low = tl.min(tl.where(keys < 0, 0x7FFFFFFF, keys), 0)
    else:
        high = low + 0x7FFFFFFF
    count = num_candidates - (INITIAL + LOCAL)
    above = count * 0
    while (low + 1 < high) & (count != FREE):
        middle = low + (high - low) // 2
        reach = count_from(
            keys, middle, importance, carry, num_candidates, num_tiles, S,
            INITIAL, LOCAL, TILE_S, IS_ALIGNED, ONE_TILE,
        )  # fmt: skip
        is_low = reach >= FREE
        low = tl.where(is_low, middle, low)
        count = tl.where(is_low, reach, count)
        high = tl.where(is_low, high, middle)
        above = tl.where(is_low, above, reach)
    has_ties = count != FREE
    num_equal = above * 0
    num_chosen = above * 0
    for i_tile in range(0, num_tiles):
        if ONE_TILE:
            tile = keys
        else:
            tile = rank_blocks(
                importance, carry, num_candidates, i_tile, S, INITIAL, LOCAL, TILE_S, IS_ALIGNED
            )
        chosen = (tile >= low).to(tl.int32)
        if has_ties:
            # All that reach low and not high are equal to it.
            equal = (tile == low).to(tl.int32)
            rank = above + num_equal + tl.cumsum(equal, 0)
            chosen = tl.where((equal == 1) & (rank > FREE), 0, chosen)
            num_equal += tl.sum(equal, 0)
        place = num_chosen + tl.cumsum(chosen, 0) - 1
        o_block = i_tile * TILE_S + tl.arange(0, TILE_S)
        tl.store(p_out + place, o_block, chosen == 1)
        if not ONE_TILE:
            num_chosen += tl.sum(chosen, 0)


@triton.jit
def top_blocks_kernel(
    importance,
    carry,
    row_positions,
    row_tokens,
    block_indices,
    G,
    S,
    SELECTION_BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr,
    CHOSEN_PADDED: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    TILE_S: tl.constexpr,
    LEAST_TILE_S: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Write block_indices [T, G, CHOSEN] of one row of importance [rows, G, S].

    row_positions holds each row's position in its sequence (-1: no row), row_tokens its packed
    token (None: the row's number). Blocks after the position's own are never used.
    """
    i_query = tl.program_id(0) // G
    i_group = tl.program_id(0) % G
    position = tl.load(row_positions + i_query)
    if position < 0:
        return
    i_token = i_query.to(tl.int64)
    if row_tokens is not None:
        i_token = tl.load(row_tokens + i_query).to(tl.int64)
    p_out = block_indices + (i_token * G + i_group) * CHOSEN
    num_candidates = position // SELECTION_BLOCK + 1
    o_chosen = tl.arange(0, CHOSEN_PADDED)
    if num_candidates <= CHOSEN:
        # Importances do not matter and were not computed.
        all_blocks = tl.where(o_chosen < num_candidates, o_chosen, -1)
        tl.store(p_out + o_chosen, all_blocks, o_chosen < CHOSEN)
        return
    FREE: tl.constexpr = CHOSEN - INITIAL - LOCAL
    forced = tl.where(o_chosen < INITIAL, o_chosen, num_candidates - CHOSEN + o_chosen)
    m_forced = (o_chosen < INITIAL) | (o_chosen >= CHOSEN - LOCAL)
    tl.store(p_out + o_chosen, forced, m_forced & (o_chosen < CHOSEN))
    if FREE == 0:
        return
    row = (i_query.to(tl.int64) * G + i_group) * S
    importance += row
    if carry is not None:
        carry += row
    p_out += INITIAL
    # A row's work follows its position: half of the blocks on average.
    HALF: tl.constexpr = TILE_S // 2 if ONE_TILE and TILE_S // 2 >= LEAST_TILE_S else TILE_S
    QUARTER: tl.constexpr = TILE_S // 4 if ONE_TILE and TILE_S // 4 >= LEAST_TILE_S else HALF
    if (num_candidates <= QUARTER) & (QUARTER < HALF):
        choose_free_blocks(
            importance, carry, p_out, num_candidates, S,
            FREE, INITIAL, LOCAL, QUARTER, IS_ALIGNED, ONE_TILE,
        )  # fmt: skip
    elif (num_candidates <= HALF) & (HALF < TILE_S):
        choose_free_blocks(
            importance, carry, p_out, num_candidates, S,
            FREE, INITIAL, LOCAL, HALF, IS_ALIGNED, ONE_TILE,
        )  # fmt: skip
    else:
        choose_free_blocks(
            importance, carry, p_out, num_candidates, S,
            FREE, INITIAL, LOCAL, TILE_S, IS_ALIGNED, ONE_TILE,
        )  # fmt: skip


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
        importance: fp32 [rows, G, S]; entry j of a row is used only for j <= position // l', and
            only where these candidates are more than n.
        row_positions: int32 [rows], position of the row's query in its sequence, -1 for no query.
        row_tokens: int32 [rows], the query's packed token: where its blocks are written; None:
            the row's own number.
        block_indices: int32 [T, G, n], ascending, -1 last.
        carry: fp32 like importance, to be added to it; entry 0 is not used.

    Source:
        arXiv 2502.11089, Eq. 11; forced blocks section 4.1; ties go to the lower block.
    """
    num_rows, num_groups, num_blocks = importance.shape
    if num_rows == 0:
        return
    tile_blocks = min(_MAX_TILE_BLOCKS, max(32, triton.next_power_of_2(num_blocks)))
    chosen = config.num_selected_blocks
    top_blocks_kernel[(num_rows * num_groups,)](
        importance,
        carry,
        row_positions,
        row_tokens,
        block_indices,
        num_groups,
        num_blocks,
        SELECTION_BLOCK=config.selection_block_size,
        CHOSEN=chosen,
        CHOSEN_PADDED=triton.next_power_of_2(chosen),
        INITIAL=config.num_initial_blocks,
        LOCAL=config.num_local_blocks,
        TILE_S=tile_blocks,
        LEAST_TILE_S=_LEAST_TILE_BLOCKS,
        IS_ALIGNED=num_blocks % 16 == 0,
        ONE_TILE=num_blocks <= _MAX_TILE_BLOCKS,
        num_warps=max(1, tile_blocks // _WARP_BLOCKS),
    )
