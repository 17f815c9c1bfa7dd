"""Sums of programs that share a tile of outputs: each leaves its own, the last one adds them up.

A tile has a tally, 0 before and after: who counts last finds the others' sums written. They are
added in the order of the channels, whoever was last.
"""

import triton
import triton.language as tl


@triton.jit
def store_part(
    p_part,
    b_out,
    b_up,
    b_squares,
    IS_SWIGLU: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """Leave products [TILE_N, TILE_T], of SwiGLU two, and squares [TILE_T], fp32."""
    CELLS: tl.constexpr = TILE_N * TILE_T
    o_row = tl.arange(0, TILE_T)
    o_cell = tl.arange(0, TILE_N)[:, None] + o_row[None, :] * TILE_N
    tl.store(p_part + o_cell, b_out)
    if IS_SWIGLU:
        tl.store(p_part + CELLS + o_cell, b_up)
    tl.store(p_part + 2 * CELLS + o_row, b_squares)


@triton.jit
def is_last_part(p_tally, PARTS: tl.constexpr):
    """Whether all other programs of the tile have left their sums; the tally is 0 again then."""
    # What all threads of this program wrote comes before its count, theirs before they are read.
    tl.debug_barrier()
    is_last = tl.atomic_add(p_tally, 1) == PARTS - 1
    if is_last:
        tl.store(p_tally, 0)
    tl.debug_barrier()
    return is_last


@triton.jit
def join_parts(
    p_first,
    IS_SWIGLU: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    """(products, second products of SwiGLU, squares) of all parts of a tile."""
    CELLS: tl.constexpr = TILE_N * TILE_T
    o_row = tl.arange(0, TILE_T)
    o_cell = tl.arange(0, TILE_N)[:, None] + o_row[None, :] * TILE_N
    b_out = tl.zeros([TILE_N, TILE_T], tl.float32)
    b_up = b_out
    b_squares = tl.zeros([TILE_T], tl.float32)
    for i_part in tl.static_range(PARTS):
        p_part = p_first + i_part * (2 * CELLS + TILE_T)
        # Past the first-level cache, which may hold what was there before.
        b_out += tl.load(p_part + o_cell, cache_modifier=".cg")
        if IS_SWIGLU:
            b_up += tl.load(p_part + CELLS + o_cell, cache_modifier=".cg")
        b_squares += tl.load(p_part + 2 * CELLS + o_row, cache_modifier=".cg")
    return b_out, b_up, b_squares
