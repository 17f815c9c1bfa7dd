"""Join what the passes by blocks left for every choice of a token.

A program holds one token with the R heads of one group and adds the parts of its choices in the
order of block_indices, so that equal inputs give equal bits.
"""

# Jitted functions and their launches have no types that a checker knows.
# pyright: reportArgumentType=false, reportCallIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.triton_backend.tiles import LN_2, load_rows, store_rows

# Elements that a warp holds of a part: two loads of 16 bytes for each thread, of all parts at once.
_WARP_ELEMENTS = 512
_MAX_UNROLL = 16


def merge_softmax(
    parts: Tensor, part_lse: Tensor, places: Tensor, tiles: int, out: Tensor, lse: Tensor
) -> None:
    """Write out [T, H, V] and natural lse [T, H] of the tokens of a range.

    Args:
        parts: [choices * tiles * R, V], the parts of each choice, normalised by themselves.
        part_lse: fp32, one for each row of parts, in base 2.
        places: int32 [T, G, n], where a choice lies in parts; -1 for none.
        tiles: parts of a choice.
    """
    grid, sizes = _launch(places, tiles, out)
    merge_softmax_kernel[grid](parts, part_lse, places, out, lse, **sizes)


@dataclass(frozen=True, slots=True)
class QueryParts:
    """Parts of a gradient of queries: what each choice adds to each head.

    Those of 16-bit inputs are float16 with a largest entry of 1 in each row, the rest of it in
    `peaks`: as small as the inputs' own type, but their sum keeps 11 bits, whatever its range.
    """

    rows: Tensor
    """[choices * tiles * R, K]"""
    peaks: Tensor | None
    """fp32, one for each row; None where rows are fp32 as they are."""

    @classmethod
    def empty(cls, q: Tensor, count: int) -> "QueryParts":
        """Room for `count` rows of q's width."""
        if q.dtype == torch.float32:
            return cls(q.new_empty(count, q.shape[2]), None)
        peaks = q.new_empty(count, dtype=torch.float32)
        return cls(q.new_empty(count, q.shape[2], dtype=torch.float16), peaks)


def merge_sum(
    parts: QueryParts,
    places: Tensor,
    tiles: int,
    out: Tensor,
    scale: float,
    others: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write out [T, H, K]: the parts of every choice added up, times scale, plus `others`."""
    grid, sizes = _launch(places, tiles, out)
    merge_sum_kernel[grid](
        parts.rows, parts.peaks, places, *(others or (None, None)), out, scale, **sizes
    )


def _launch(places: Tensor, tiles: int, out: Tensor) -> tuple[tuple[int], dict[str, int]]:
    num_tokens, num_groups, num_choices = places.shape
    heads_per_group, width = out.shape[1] // num_groups, out.shape[2]
    rows, columns = triton.next_power_of_2(heads_per_group), triton.next_power_of_2(width)
    return (num_tokens * num_groups,), {
        "R": heads_per_group,
        "N": num_choices,
        "TILES": tiles,
        "WIDTH": width,
        "WIDTH_PADDED": columns,
        "TILE_ROWS": rows,
        "UNROLL": min(_MAX_UNROLL, num_choices * tiles),
        "num_warps": min(8, max(1, rows * columns // _WARP_ELEMENTS)),
    }


@triton.jit
def merge_softmax_kernel(
    parts,
    part_lse,
    places,
    out,
    lse,
    R: tl.constexpr,
    N: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """out and lse: parts weighed by the softmax of their lse; 0 and -inf for tokens without any."""
    i_row = tl.program_id(0).to(tl.int64)
    o_row = tl.arange(0, TILE_ROWS)
    m_row = o_row < R
    b_max = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    for i_part in tl.range(0, N * TILES, loop_unroll_factor=UNROLL):
        place = tl.load(places + i_row * N + i_part // TILES).to(tl.int64)
        o_part = (place * TILES + i_part % TILES) * R + o_row
        b_lse = tl.load(part_lse + o_part, mask=m_row & (place >= 0), other=float("-inf"))
        b_max = tl.maximum(b_max, b_lse)
    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = tl.zeros([TILE_ROWS], tl.float32)
    b_out = tl.zeros([TILE_ROWS, WIDTH_PADDED], tl.float32)
    for i_part in tl.range(0, N * TILES, loop_unroll_factor=UNROLL):
        place = tl.load(places + i_row * N + i_part // TILES).to(tl.int64)
        o_part = (place * TILES + i_part % TILES) * R + o_row
        m_part = m_row & (place >= 0)
        b_lse = tl.load(part_lse + o_part, mask=m_part, other=float("-inf"))
        b_weight = tl.exp2(b_lse - b_shift)
        b_sum += b_weight
        b_part = load_rows(parts, o_part * WIDTH, m_part, 0, WIDTH_PADDED, WIDTH, True)
        b_out += b_part.to(tl.float32) * b_weight[:, None]
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_out / b_sum[:, None]
    store_rows(out + i_row * R * WIDTH, b_out, o_row * WIDTH, m_row, 0, WIDTH_PADDED, WIDTH)
    tl.store(lse + i_row * R + o_row, (b_max + tl.log2(b_sum)) * LN_2, mask=m_row)


@triton.jit
def merge_sum_kernel(
    parts,
    peaks,
    places,
    one,
    other,
    out,
    scale,
    R: tl.constexpr,
    N: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """out = scale times the sum of the parts, 0 for tokens without any, plus one and other."""
    i_row = tl.program_id(0).to(tl.int64)
    o_row = tl.arange(0, TILE_ROWS)
    m_row = o_row < R
    b_out = tl.zeros([TILE_ROWS, WIDTH_PADDED], tl.float32)
    for i_part in tl.range(0, N * TILES, loop_unroll_factor=UNROLL):
        place = tl.load(places + i_row * N + i_part // TILES).to(tl.int64)
        o_part = (place * TILES + i_part % TILES) * R + o_row
        m_part = m_row & (place >= 0)
        b_part = load_rows(parts, o_part * WIDTH, m_part, 0, WIDTH_PADDED, WIDTH, True)
        b_part = b_part.to(tl.float32)
        if peaks is not None:
            b_part = b_part * tl.load(peaks + o_part, mask=m_part, other=0.0)[:, None]
        b_out += b_part
    b_out = b_out * scale
    o_out = (i_row * R + o_row) * WIDTH
    if one is not None:
        b_out += load_rows(one, o_out, m_row, 0, WIDTH_PADDED, WIDTH, True).to(tl.float32)
        b_out += load_rows(other, o_out, m_row, 0, WIDTH_PADDED, WIDTH, True).to(tl.float32)
    store_rows(out + i_row * R * WIDTH, b_out, o_row * WIDTH, m_row, 0, WIDTH_PADDED, WIDTH)
