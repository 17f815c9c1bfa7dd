"""Linear layers on few rows: each weight is read once, and with it all that lies around the layer.

A program takes some rows of one weight and all rows of x, and walks the channels, or a part of
them. The norm needs no pass of its own: the product is taken of x times the norm's weight, the
squares of x are summed beside it, and the root divides the sum at the end.
"""

# Jitted functions and their launches have no types that a checker knows.
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.projections import Projection, RmsNorm
from nsa_kernels.triton_backend.few_rows_parts import is_last_part, join_parts, store_part
from nsa_kernels.triton_backend.tiles import (
    await_launch,
    early_start,
    let_next_start,
    power_of_two_within,
)

# Two thirds of the multiprocessors of a large GPU read as fast as all of them.
_WANTED_PROGRAMS = 88
# What a matrix product takes at least.
_LEAST_ROWS = _LEAST_OUTPUTS = _LEAST_CHANNELS = 16
_MOST_OUTPUTS = 64
_MOST_CHANNELS = 512
# Shared memory of a program, which has a multiprocessor to itself on GPUs with a copy engine, and
# must run on every other.
_PROGRAM_BYTES = {True: 227 * 2**10, False: 60 * 2**10}
# Tiles under way, beside which the first one has a place of its own.
_LEAST_STAGES = 4
_MOST_STAGES = 6
# From so many rows on, four warps spend longer on the norm of x than its weights take to come.
_MANY_ROWS = 64


@dataclass(frozen=True, slots=True)
class Launch:
    """Rows of x and of a weight in a tile, channels of both, parts that a weight's channels are cut
    into, and how the compiler spreads a program."""

    rows: int
    outputs: int
    channels: int
    parts: int
    num_stages: int
    num_warps: int


def plan(
    num_rows: int,
    width: int,
    outputs: Sequence[int],
    itemsize: int,
    *,
    is_swiglu: bool = False,
    is_alone: bool = False,
    can_share: bool = False,
) -> Launch:
    """The tiles for x [num_rows, width] and layers of so many outputs.

    The widest tile of outputs: with 64 the product runs on Hopper's tensor cores at their best, and
    x is read, from L2, by fewer programs. Where those are too few to keep the memory busy, the
    channels are cut, if programs can share a tile, and only then the tile. SwiGLU takes two tiles
    of weights.
    """
    rows = max(_LEAST_ROWS, triton.next_power_of_2(num_rows))
    program_bytes = _PROGRAM_BYTES[is_alone]

    def largest_channels(tile: int) -> tuple[int, int]:
        """Channels of a tile that leave room for stages, and bytes of one channel."""
        channel_bytes = (tile * (1 + is_swiglu) + rows) * itemsize
        within = power_of_two_within(program_bytes // ((_LEAST_STAGES + 1) * channel_bytes))
        most = min(_MOST_CHANNELS, triton.next_power_of_2(width))
        return max(_LEAST_CHANNELS, min(most, within)), channel_bytes

    tile, parts = _MOST_OUTPUTS, 1
    channels, channel_bytes = largest_channels(tile)

    def num_programs() -> int:
        return parts * sum(triton.cdiv(n, tile) for n in outputs)

    while can_share and num_programs() < _WANTED_PROGRAMS and 2 * parts * channels <= width:
        parts *= 2
    while num_programs() < _WANTED_PROGRAMS and tile > _LEAST_OUTPUTS:
        tile //= 2
        channels, channel_bytes = largest_channels(tile)
    stages = min(_MOST_STAGES, program_bytes // (channels * channel_bytes) - 1)
    is_wide = is_swiglu or rows == _MANY_ROWS
    return Launch(
        rows, tile, channels, parts, stages, 8 if tile == _MOST_OUTPUTS and is_wide else 4
    )


def project(
    x: Tensor,
    projections: Sequence[Projection],
    norm: RmsNorm | None,
    residual: Tensor | None,
    tallies: Tensor | None,
) -> list[Tensor]:
    """Each projection of x, or of its norm: one launch."""
    num_rows, width = x.shape
    outs = [x.new_empty(num_rows, one.width) for one in projections]
    if num_rows == 0:
        return outs
    x = x.contiguous()
    is_swiglu = projections[0].activation == "swiglu"
    outputs = [one.width for one in projections]
    options = early_start(x.device)
    launch = plan(
        num_rows, width, outputs, x.itemsize,
        is_swiglu=is_swiglu, is_alone=bool(options), can_share=tallies is not None,
    )  # fmt: skip
    tiles = [triton.cdiv(n, launch.outputs) for n in outputs]
    parts, sums = launch.parts, x
    if parts > 1:
        part_size = (2 * launch.outputs + 1) * launch.rows
        sums = torch.empty(sum(tiles) * parts * part_size, dtype=torch.float32, device=x.device)
    few_rows_kernel[(sum(tiles) * parts,)](
        x, x if norm is None else norm.weight, x if residual is None else residual,
        *_threefold([one.weight for one in projections]),
        *_threefold([x if one.bias is None else one.bias for one in projections]),
        *_threefold(outs),
        *_threefold(outputs),
        *_threefold([int(one.bias is not None) for one in projections]),
        *_threefold([int(one.activation == "sigmoid") for one in projections]),
        sums, x if tallies is None else tallies,
        tiles[0], sum(tiles[:2]), num_rows, 0.0 if norm is None else norm.eps,
        D=width,
        PART_D=triton.cdiv(triton.cdiv(width, parts), launch.channels) * launch.channels,
        PARTS=parts,
        IS_SWIGLU=is_swiglu,
        IS_NORMED=norm is not None,
        IS_ADDED=residual is not None,
        TILE_T=launch.rows,
        TILE_N=launch.outputs,
        TILE_D=launch.channels,
        PRECISION=_precision(x.dtype),
        STARTS_EARLY=bool(options),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **options,
    )  # fmt: skip
    return outs


def _precision(dtype: torch.dtype) -> str:
    """How products are taken; fp32 as tiles.fp32_tiles says."""
    if dtype != torch.float32:
        return "tf32"
    return "tf32x3" if torch.version.hip is None else "ieee"


def _threefold(values: list[Any]) -> list[Any]:
    """Three values: layers that are not there repeat the first, no program takes them."""
    return [*values, values[0], values[0]][:3]


@triton.jit
def load_weights(p_weight, m_out, o_channel, D: tl.constexpr, IS_WHOLE: tl.constexpr):
    """A tile [TILE_N, TILE_D] of a weight, whose channels are o_channel; IS_WHOLE: all of them."""
    if IS_WHOLE:
        b_weight = tl.load(p_weight, m_out[:, None], 0.0)
    else:
        b_weight = tl.load(p_weight, m_out[:, None] & (o_channel < D)[None, :], 0.0)
    return b_weight


@triton.jit
def load_input(
    x,
    norm_weight,
    b_squares,
    m_row,
    o_channel,
    D: tl.constexpr,
    TILE_T: tl.constexpr,
    IS_NORMED: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """A tile [TILE_D, TILE_T] of x, times the norm's weight; adds its squares to b_squares."""
    if IS_WHOLE:
        m_tile = m_row[None, :]
    else:
        m_tile = m_row[None, :] & (o_channel < D)[:, None]
    o_row = tl.arange(0, TILE_T)
    b_x = tl.load(x + (o_row[None, :] * D + o_channel[:, None]), m_tile, 0.0)
    if IS_NORMED:
        b_exact = b_x.to(tl.float32)
        b_squares += b_exact * b_exact
        b_norm = tl.load(norm_weight + o_channel, o_channel < D, 0.0).to(tl.float32)
        b_x = (b_exact * b_norm[:, None]).to(b_x.dtype)
    return b_x, b_squares


@triton.jit
def multiply(
    x,
    norm_weight,
    weight,
    i_tile,
    first_channel,
    width,
    num_rows,
    D: tl.constexpr,
    PART_D: tl.constexpr,
    PARTS: tl.constexpr,
    IS_SWIGLU: tl.constexpr,
    IS_NORMED: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STARTS_EARLY: tl.constexpr,
):
    """(products, second products of SwiGLU, squares of x) over PART_D channels.

    Products are [TILE_N, TILE_T] of the i_tile-th tile of a weight, squares [TILE_T]; fp32.
    """
    IS_WHOLE: tl.constexpr = D % TILE_D == 0 and D == PARTS * PART_D
    o_out = i_tile * TILE_N + tl.arange(0, TILE_N)
    m_out = o_out < width
    o_channel = first_channel + tl.arange(0, TILE_D)
    p_weight = weight + (o_out.to(tl.int64)[:, None] * D + o_channel[None, :])
    p_up = p_weight + tl.full([], 1, tl.int64) * width * D
    # Weights wait for nobody: the first tile comes while the launch before still runs.
    b_weight = load_weights(p_weight, m_out, o_channel, D, IS_WHOLE)
    if IS_SWIGLU:
        b_weight_up = load_weights(p_up, m_out, o_channel, D, IS_WHOLE)
    let_next_start(STARTS_EARLY)
    await_launch(STARTS_EARLY)
    m_row = tl.arange(0, TILE_T) < num_rows
    b_squares = tl.zeros([TILE_D, TILE_T], tl.float32)
    b_x, b_squares = load_input(
        x, norm_weight, b_squares, m_row, o_channel, D, TILE_T, IS_NORMED, IS_WHOLE
    )
    b_out = tl.dot(b_weight, b_x, input_precision=PRECISION)
    b_up = b_out
    if IS_SWIGLU:
        b_up = tl.dot(b_weight_up, b_x, input_precision=PRECISION)
    for first in range(TILE_D, PART_D, TILE_D):
        b_weight = load_weights(p_weight + first, m_out, first + o_channel, D, IS_WHOLE)
        b_x, b_squares = load_input(
            x, norm_weight, b_squares, m_row, first + o_channel, D, TILE_T, IS_NORMED, IS_WHOLE
        )
        b_out = tl.dot(b_weight, b_x, b_out, input_precision=PRECISION)
        if IS_SWIGLU:
            b_weight_up = load_weights(p_up + first, m_out, first + o_channel, D, IS_WHOLE)
            b_up = tl.dot(b_weight_up, b_x, b_up, input_precision=PRECISION)
    return b_out, b_up, tl.sum(b_squares, 0)


@triton.jit(
    do_not_specialize=[
        "width_0", "width_1", "width_2", "has_bias_0", "has_bias_1", "has_bias_2", "is_sigmoid_0",
        "is_sigmoid_1", "is_sigmoid_2", "end_0", "end_1", "num_rows",
    ]
)  # fmt: skip
def few_rows_kernel(
    x,
    norm_weight,
    residual,
    weight_0,
    weight_1,
    weight_2,
    bias_0,
    bias_1,
    bias_2,
    out_0,
    out_1,
    out_2,
    width_0,
    width_1,
    width_2,
    has_bias_0,
    has_bias_1,
    has_bias_2,
    is_sigmoid_0,
    is_sigmoid_1,
    is_sigmoid_2,
    sums,
    tallies,
    end_0,
    end_1,
    num_rows,
    norm_eps,
    D: tl.constexpr,
    PART_D: tl.constexpr,
    PARTS: tl.constexpr,
    IS_SWIGLU: tl.constexpr,
    IS_NORMED: tl.constexpr,
    IS_ADDED: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STARTS_EARLY: tl.constexpr,
):
    """Some outputs of one layer for all rows of x. The layers' tiles lie one after the other, each
    with all its parts."""
    i_tile, i_part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    weight, bias, out, width = weight_0, bias_0, out_0, width_0
    has_bias, is_sigmoid = has_bias_0, is_sigmoid_0
    i_own = i_tile
    if i_tile >= end_1:
        weight, bias, out, width = weight_2, bias_2, out_2, width_2
        has_bias, is_sigmoid = has_bias_2, is_sigmoid_2
        i_own = i_tile - end_1
    elif i_tile >= end_0:
        weight, bias, out, width = weight_1, bias_1, out_1, width_1
        has_bias, is_sigmoid = has_bias_1, is_sigmoid_1
        i_own = i_tile - end_0
    b_out, b_up, b_squares = multiply(
        x, norm_weight, weight, i_own, i_part * PART_D, width, num_rows, D, PART_D, PARTS,
        IS_SWIGLU, IS_NORMED, TILE_T, TILE_N, TILE_D, PRECISION, STARTS_EARLY,
    )  # fmt: skip
    if PARTS > 1:
        PART_SIZE: tl.constexpr = (2 * TILE_N + 1) * TILE_T
        p_first = sums + i_tile * PARTS * PART_SIZE
        store_part(p_first + i_part * PART_SIZE, b_out, b_up, b_squares, IS_SWIGLU, TILE_T, TILE_N)
        if not is_last_part(tallies + i_tile, PARTS):
            return
        b_out, b_up, b_squares = join_parts(p_first, IS_SWIGLU, TILE_T, TILE_N, PARTS)
    o_out = i_own * TILE_N + tl.arange(0, TILE_N)
    m_out = o_out < width
    if IS_NORMED:
        b_root = tl.rsqrt(b_squares / D + norm_eps)[None, :]
        b_out *= b_root
        b_up *= b_root
    b_out += tl.load(bias + o_out, m_out & (has_bias != 0), 0.0).to(tl.float32)[:, None]
    if IS_SWIGLU:
        b_up += tl.load(bias + width + o_out, m_out & (has_bias != 0), 0.0).to(tl.float32)[:, None]
        b_out = b_out * tl.sigmoid(b_out) * b_up
    if is_sigmoid != 0:
        b_out = tl.sigmoid(b_out)
    o_row = tl.arange(0, TILE_T)
    o_target = o_row[None, :] * width + o_out[:, None]
    m_target = (o_row < num_rows)[None, :] & m_out[:, None]
    if IS_ADDED:
        b_out += tl.load(residual + o_target, m_target, 0.0).to(tl.float32)
    tl.store(out + o_target, b_out.to(out.dtype.element_ty), m_target)
