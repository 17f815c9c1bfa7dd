"""What the attention kernels share: widths, tiles in packed sequences, the softmax's base.

A tile of queries holds `rows`: consecutive tokens, each with the R query heads of one group, so
that one key tile serves all of them. Row r is head r % R of token r // R. Rows beyond
TOKENS = TILE_ROWS // R tokens are padding (R need not be a power of two).

Softmax runs in base 2: logits are scaled by scale * log2(e) in fp32 after the dot, never in the
inputs' precision. What leaves a kernel as lse is natural.

Widths that are no power of two are read as a power of two and a smaller one (192 = 128 + 64, which
saves a quarter of the products, registers and shared memory that padding to 256 would cost), or
padded with masked columns where even that does not fit.
"""

# Jitted functions and their launches have no types that a checker knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# So many of a sequence's last compressed keys may still be written when attention starts early.
EARLY_BLOCKS = tl.constexpr(64)


@dataclass(frozen=True, slots=True)
class Tiles:
    """What one program holds: rows of queries, keys, and how the compiler spreads them."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    precision: str = "ieee"
    """How tl.dot multiplies fp32; 16-bit products are exact before they are added."""


def power_of_two_within(number: int) -> int:
    """The largest power of two that is not above a number from 1 on."""
    return 1 << (number.bit_length() - 1)


def split_width(width: int) -> tuple[int, int]:
    """(main, tail): powers of two that a tile of this width is read in; tail is 0 for none."""
    padded = triton.next_power_of_2(width)
    main = padded // 2
    tail = width - main
    if tail >= 16 and tail == triton.next_power_of_2(tail) and tail < main:
        return main, tail
    return padded, 0


def key_widths(key_width: int) -> dict[str, int]:
    """The constants that the kernels want about K."""
    main, tail = split_width(key_width)
    return {"K": key_width, "K_MAIN": main, "K_TAIL": tail}


def value_widths(value_width: int) -> dict[str, int]:
    """The constants that the kernels want about V, padded to a power of two."""
    return {"V": value_width, "V_PADDED": triton.next_power_of_2(value_width)}


def log2_scale(scale: float) -> float:
    """What logits are multiplied with to come out in base 2.

    Raises:
        ValueError: scale is not positive; the running maximum is taken before scaling.
    """
    if not scale > 0:
        raise ValueError(f"scale={scale} must be positive")
    return scale * LOG2_E.value


def fp32_tiles(key_width: int, value_width: int, least_rows: int) -> Tiles:
    """Tile sizes of every kernel for fp32, which is for tests and small models.

    On NVIDIA a product is three tf32 products of high and low parts: 22 bits of mantissa at tensor
    core speed, where plain tf32 would keep 11. "ieee" unrolls products into scalar instructions
    (minutes to compile with large tiles), but holds no second copy of its operands in shared
    memory, which at 64 rows of more than 128 would not fit.
    """
    rows = int(triton.next_power_of_2(least_rows))
    is_wide = max(key_width, value_width) > 128
    num_warps = 8 if is_wide or rows > 32 else 4
    is_scalar = torch.version.hip is not None or (is_wide and rows > 32)
    precision = "ieee" if is_scalar else "tf32x3"
    return Tiles(rows, 16 if is_wide else 32, num_warps, 1, precision)


def has_copy_engine(device: torch.device) -> bool:
    """Whether tensor descriptors load by hardware: NVIDIA GPUs from Hopper on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def register_limit(device: torch.device, registers: int) -> dict[str, int]:
    """The option of a launch that bounds a thread's registers, on the GPUs it was chosen for."""
    return {"maxnreg": registers} if has_copy_engine(device) else {}


def early_start(device: torch.device) -> dict[str, bool]:
    """Options of a launch whose programs may start while the launch before it still runs.

    Its kernel must call await_launch before it reads what that launch writes, and in at least one
    program whatever it reads: the launch after it counts on both to have ended.
    """
    return {"launch_pdl": True} if has_copy_engine(device) else {}


@triton.jit
def await_launch(STARTS_EARLY: tl.constexpr):
    """Wait for the end of the launch before, where this one was started early."""
    if STARTS_EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(STARTS_EARLY: tl.constexpr):
    """Let the next launch start once all programs of this one have come here."""
    if STARTS_EARLY:
        tl.extra.cuda.gdc_launch_dependents()


def descriptors(rows: int, *tensors: Tensor) -> tuple[TensorDescriptor | None, ...]:
    """Tiles of `rows` rows of one head of each [N, heads, width], for Hopper's copy engine.

    To be loaded at [row, head * width]. None for all where _are_copied says no.
    """
    if not _are_copied(tensors):
        return (None,) * len(tensors)
    return tuple(
        TensorDescriptor.from_tensor(t.view(t.shape[0], -1), [rows, t.shape[2]]) for t in tensors
    )


def group_descriptors(
    tokens: int, heads: int, *tensors: Tensor
) -> tuple[TensorDescriptor | None, ...]:
    """Tiles of all heads of a group of each [T, H, width], for the copy engine.

    To be loaded at [token, first head, 0]. None for all where _are_copied says no, or where
    `tokens` tokens of `heads` heads are no power of two.
    """
    if (tokens * heads) & (tokens * heads - 1) or not _are_copied(tensors):
        return (None,) * len(tensors)
    return tuple(TensorDescriptor.from_tensor(t, [tokens, heads, t.shape[2]]) for t in tensors)


def _are_copied(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the copy engine is there and takes these: 16-bit rows of powers of two, not none,
    from addresses that are multiples of 16."""
    return has_copy_engine(tensors[0].device) and all(
        len(t) > 0
        and t.itemsize == 2
        and t.shape[2] & (t.shape[2] - 1) == 0
        and t.data_ptr() % 16 == 0
        for t in tensors
    )


def row_delta(out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor) -> Tensor:
    """sum(dout * out) - dlse of every row, fp32 [T, H]: what p's gradient is measured against."""
    num_rows, value_width = lse.numel(), out.shape[-1]
    delta = torch.empty_like(lse)
    tile = max(1, 4096 // triton.next_power_of_2(value_width))
    row_delta_kernel[(triton.cdiv(num_rows, tile),)](
        out, dout, lse, dlse, delta, num_rows, TILE_ROWS=tile, **value_widths(value_width)
    )
    return delta


@triton.jit
def load_rows(
    matrix,
    o_row,
    m_row,
    FIRST: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Columns [FIRST, FIRST + SPAN) of the rows that start o_row elements after matrix.

    Columns from WIDTH on read as 0, and so do rows outside m_row if MASKED.
    """
    o_column = FIRST + tl.arange(0, SPAN)
    p_tile = matrix + (o_row[:, None] + o_column[None, :])
    if FIRST + SPAN > WIDTH:
        m_tile = (o_column < WIDTH)[None, :]
        if MASKED:
            m_tile = m_tile & m_row[:, None]
        b_tile = tl.load(p_tile, mask=m_tile, other=0.0)
    elif MASKED:
        b_tile = tl.load(p_tile, mask=m_row[:, None], other=0.0)
    else:
        b_tile = tl.load(p_tile)
    return b_tile


@triton.jit
def store_rows(
    matrix,
    b_tile,
    o_row,
    m_row,
    FIRST: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write b_tile [rows, SPAN] as columns [FIRST, FIRST + SPAN) of the rows of m_row."""
    o_column = FIRST + tl.arange(0, SPAN)
    p_tile = matrix + (o_row[:, None] + o_column[None, :])
    m_tile = m_row[:, None] & (o_column < WIDTH)[None, :]
    tl.store(p_tile, b_tile.to(matrix.dtype.element_ty), mask=m_tile)


@triton.jit
def find_sequence(cu_seqlens, num_sequences, i_tile, TILE: tl.constexpr):
    """The last sequence whose first tile, cu_seqlens[b] // TILE + b, is not after i_tile."""
    low = num_sequences * 0
    high = num_sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        is_late = tl.load(cu_seqlens + middle) // TILE + middle > i_tile
        low = tl.where(is_late, low, middle)
        high = tl.where(is_late, middle - 1, high)
    return low


@triton.jit
def find_tile(cu_seqlens, num_sequences, i_tile, TILE: tl.constexpr):
    """(sequence, its first row in the packed order, its length, the tile's first row in it).

    The tile is empty if that last number is not below the length.
    """
    i_sequence = find_sequence(cu_seqlens, num_sequences, i_tile, TILE)
    start = tl.load(cu_seqlens + i_sequence)
    length = tl.load(cu_seqlens + i_sequence + 1) - start
    first = (i_tile - (start // TILE + i_sequence)) * TILE
    return i_sequence, start, length, first


@triton.jit
def visible_low(o_token, WINDOW: tl.constexpr):
    """First key that a query at position o_token sees; WINDOW 0 means no window."""
    if WINDOW > 0:
        low = tl.maximum(o_token - (WINDOW - 1), 0)
    else:
        low = o_token * 0
    return low


@triton.jit
def visible_high(o_token, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """End of the keys that a query at position o_token sees.

    Key i ends at token i * STRIDE + BLOCK - 1 and is seen from there on. Raw keys have
    BLOCK = STRIDE = 1. The numerator is kept non-negative: division truncates towards zero.
    """
    return tl.maximum(o_token - (BLOCK - 1) + STRIDE, 0) // STRIDE


@triton.jit
def log2_sum(lse, o_row, m_row):
    """lse in base 2 for exp2(logits - lse): +inf where no key was seen, so that it gives 0."""
    b_lse = tl.load(lse + o_row, mask=m_row, other=float("-inf"))
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2_E)


@triton.jit
def row_delta_kernel(
    out,
    dout,
    lse,
    dlse,
    delta,
    num_rows,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """delta = rowsum(dout * out) - dlse over flat rows; 0 where the row saw no key."""
    o_row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    m_row = o_row < num_rows
    b_out = load_rows(out, o_row * V, m_row, 0, V_PADDED, V, True).to(tl.float32)
    b_dout = load_rows(dout, o_row * V, m_row, 0, V_PADDED, V, True).to(tl.float32)
    b_lse = tl.load(lse + o_row, mask=m_row, other=0.0)
    b_delta = tl.sum(b_out * b_dout, 1) - tl.load(dlse + o_row, mask=m_row, other=0.0)
    b_delta = tl.where(b_lse == float("-inf"), 0.0, b_delta)
    tl.store(delta + o_row, b_delta, mask=m_row)
