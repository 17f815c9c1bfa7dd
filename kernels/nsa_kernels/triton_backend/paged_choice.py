"""The n most important selection blocks of one new token and group, inside a kernel (Eq. 9-11).

What the parts of the compressed branch left is brought to a common maximum, normalised and summed
over the heads. The n-th largest sum is then searched for among their bits: importances are not
negative, so that these keep their order as integers.
"""

import triton
import triton.language as tl

# Above every importance: the bits of infinity.
FORCED = tl.constexpr(0x7F800000)
# Trials of a pass of the search. With more there are fewer passes, which take longer.
TRIALS = tl.constexpr(8)


@triton.jit
def head_norms(
    partial_lse,
    o_head,
    m_head,
    SPLITS,
    ALL_SPLITS,
    SPLITS_PADDED: tl.constexpr,
):
    """(top, norm) of heads: exp2(x - top) * norm is the probability of a logit x in base 2.

    top is a whole number, so that exp2 of a part's maximum less top is exact.
    """
    o_split = tl.arange(0, SPLITS_PADDED)
    p_lse = partial_lse + o_head[:, None] * ALL_SPLITS + o_split[None, :]
    b_lse = tl.load(p_lse, m_head[:, None] & (o_split < SPLITS)[None, :], -float("inf"))
    largest = tl.max(b_lse, 1)
    largest = tl.where(m_head, largest, 0.0)
    total = tl.sum(tl.exp(b_lse - largest[:, None]), 1)
    lse = largest * 1.4426950408889634 + tl.log2(tl.where(m_head, total, 1.0))
    top = tl.ceil(lse)
    return top, tl.where(m_head, tl.exp2(top - lse), 0.0)


@triton.jit
def widen(b_tiles, TILE_S: tl.constexpr):
    """Every number of [rows, tiles] for TILE_S columns."""
    ROWS: tl.constexpr = b_tiles.shape[0]
    TILES: tl.constexpr = b_tiles.shape[1]
    b_wide = tl.broadcast_to(b_tiles[:, :, None], (ROWS, TILES, TILE_S))
    return tl.reshape(b_wide, (ROWS, TILES * TILE_S))


@triton.jit
def store_importance(
    shares,
    rests,
    maxima,
    partial_lse,
    importance,
    o_head,
    num_seen,
    N,
    SPLITS,
    ALL_SPLITS,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_S: tl.constexpr,
    TILE_STRIDES: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
):
    """Write the importance [N, TILE_S] of the blocks, summed over R heads from o_head on.

    TILE_N tiles of compressed keys at a time, up to the tile into which the last key seen reaches.
    Every block is summed in the same order with factors that differ by powers of two alone: equal
    scores give equal importances, which the rule for ties rests on.
    """
    o_r = tl.arange(0, R_PADDED)
    m_r = (o_r < R)[:, None]
    top, norm = head_norms(partial_lse, o_head + o_r, o_r < R, SPLITS, ALL_SPLITS, SPLITS_PADDED)
    top, norm = top[:, None], norm[:, None]
    o_row = (o_head + o_r)[:, None] * N
    o_column = tl.arange(0, TILE_N * TILE_S)
    is_first = (o_column % TILE_S == 0)[None, :]
    for first in range(0, num_seen // TILE_STRIDES + 1, TILE_N):
        o_tile = first + tl.arange(0, TILE_N)[None, :]
        m_tile = m_r & (o_tile * TILE_STRIDES < num_seen)
        m_before = m_r & (o_tile > 0) & ((o_tile - 1) * TILE_STRIDES < num_seen)
        b_factor = tl.exp2(tl.load(maxima + o_row + o_tile, m_tile, -float("inf")) - top)
        before = tl.load(maxima + o_row + o_tile - 1, m_before, -float("inf"))
        rest = tl.load(rests + o_row + o_tile - 1, m_before, 0.0) * tl.exp2(before - top)
        o_block = first * TILE_S + o_column
        m_block = m_r & (o_block // TILE_S * TILE_STRIDES < num_seen)[None, :]
        b_share = tl.load(shares + o_row * TILE_S + o_block[None, :], m_block, 0.0)
        b_share = b_share * widen(b_factor, TILE_S) + tl.where(is_first, widen(rest, TILE_S), 0.0)
        tl.store(importance + o_block, tl.sum(b_share * norm, 0), o_block < N * TILE_S)


@triton.jit
def store_chosen(
    importance,
    chosen_blocks,
    num_candidates,
    OVERLAPS: tl.constexpr,
    CHOSEN: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """Write the CHOSEN most important of num_candidates > CHOSEN blocks, ascending.

    The first INITIAL and the last LOCAL are among them; of equal ones the lower come first.
    OVERLAPS is what the importances add up to, or little less.
    """
    o_block = tl.arange(0, NUM_BLOCKS)
    b_importance = tl.load(importance + o_block, o_block < num_candidates, 0.0)
    keys = tl.minimum(b_importance.to(tl.int32, bitcast=True), FORCED - 1)
    is_forced = (o_block < INITIAL) | (o_block >= num_candidates - LOCAL)
    keys = tl.where(o_block < num_candidates, tl.where(is_forced, FORCED, keys), -1)
    # The CHOSEN-th largest is at least low and less than high. The first trials are octaves down
    # from the largest that CHOSEN of them can be at once.
    o_trial = tl.arange(0, TRIALS)
    low = num_candidates * 0
    high = low + FORCED
    num_left = num_candidates
    first = tl.full([], OVERLAPS / CHOSEN, tl.float32).to(tl.int32, bitcast=True) - (
        (TRIALS - 1) << 23
    )
    step = low + (1 << 23)
    while (high - low > 1) & (num_left > CHOSEN):
        counts = tl.sum((keys[None, :] >= (first + o_trial * step)[:, None]).to(tl.int32), 1)
        # Counts fall with the trial: the least that suffices belongs to the last that is reached.
        none = (num_left + 1) * TRIALS
        best = tl.min(tl.where(counts >= CHOSEN, (counts + 1) * TRIALS - 1 - o_trial, none), 0)
        num_reached = tl.where(best < none, TRIALS - best % TRIALS, 0)
        high = tl.where(num_reached < TRIALS, first + num_reached * step, high)
        low = tl.where(num_reached > 0, first + (num_reached - 1) * step, low)
        num_left = tl.minimum(best // TRIALS, num_left)
        step = (high - low + TRIALS) // (TRIALS + 1)
        first = low + step
    threshold = low
    is_above = (keys > threshold).to(tl.int32)
    is_equal = (keys == threshold).to(tl.int32)
    room = CHOSEN - tl.sum(is_above, 0)
    both = tl.cumsum(is_above * 65536 + is_equal, 0)
    num_above = both // 65536
    num_equal = both % 65536
    is_chosen = (is_above > 0) | ((is_equal > 0) & (num_equal <= room))
    tl.store(chosen_blocks + num_above + tl.minimum(num_equal, room) - 1, o_block, is_chosen)


@triton.jit
def choose_blocks(
    shares,
    rests,
    maxima,
    partial_lse,
    importance,
    chosen_blocks,
    o_head,
    num_seen,
    num_candidates,
    N,
    SPLITS,
    ALL_SPLITS,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_S: tl.constexpr,
    TILE_STRIDES: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    OVERLAPS: tl.constexpr,
    CHOSEN: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """Write the choice of one token and group, for this program alone to read.

    importance [N, TILE_S] and chosen_blocks [CHOSEN] are the program's own room.
    """
    store_importance(
        shares, rests, maxima, partial_lse, importance, o_head, num_seen, N, SPLITS, ALL_SPLITS,
        R, R_PADDED, TILE_N, TILE_S, TILE_STRIDES, SPLITS_PADDED,
    )  # fmt: skip
    # Each thread reads what others of this program wrote, here and below.
    tl.debug_barrier()
    store_chosen(
        importance, chosen_blocks, num_candidates, OVERLAPS, CHOSEN, INITIAL, LOCAL, NUM_BLOCKS
    )
    tl.debug_barrier()
