"""The gated sum of the three branches (Eq. 5), one pass over memory forward and one backward."""

# Jitted functions and their launches have no types that a checker knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.triton_backend.tiles import LN_2, load_rows, store_rows, value_widths

_TILE_ELEMENTS = 2048


def mix_forward(out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, gates: Tensor) -> Tensor:
    """Sum of the branches [T, H, V] times their gates [T, H, 3], in fp32, in out_cmp's dtype."""
    mixed = torch.empty_like(out_cmp)
    num_rows, value_width = gates.numel() // 3, out_cmp.shape[-1]
    if num_rows == 0:
        return mixed
    tile = _tile_rows(value_width)
    mix_forward_kernel[(triton.cdiv(num_rows, tile),)](
        out_cmp, out_slc, out_win, gates, mixed, num_rows,
        TILE_ROWS=tile, **value_widths(value_width),
    )  # fmt: skip
    return mixed


def mix_backward(
    dout: Tensor,
    outs: tuple[Tensor, Tensor, Tensor],
    lses: tuple[Tensor, Tensor, Tensor],
    gates: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the branches' backward passes need to read dout itself instead of gate * dout.

    A gate w scales a branch's probabilities p in its gradients, and w p = exp(s - (lse - log w)).

    Args:
        outs: [T, H, V] of the branches cmp, slc, win.
        lses: natural, fp32 [T, H] of the same.
        gates: [T, H, 3], none negative.

    Returns:
        dgates [T, H, 3]; lse - log(gate), fp32 [3, T, H]; rowsum(dout * out), fp32 [3, T, H].
    """
    dgates = torch.empty_like(gates)
    gated_lse = gates.new_empty(3, *gates.shape[:2], dtype=torch.float32)
    deltas = torch.empty_like(gated_lse)
    num_rows, value_width = gates.numel() // 3, dout.shape[-1]
    if num_rows == 0:
        return dgates, gated_lse, deltas
    tile = _tile_rows(value_width)
    mix_backward_kernel[(triton.cdiv(num_rows, tile),)](
        dout, *outs, *lses, gates, dgates, gated_lse, deltas, num_rows,
        TILE_ROWS=tile, **value_widths(value_width),
    )  # fmt: skip
    return dgates, gated_lse, deltas


def _tile_rows(value_width: int) -> int:
    return max(1, _TILE_ELEMENTS // triton.next_power_of_2(value_width))


@triton.jit
def mix_forward_kernel(
    out_cmp,
    out_slc,
    out_win,
    gates,
    mixed,
    num_rows,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """mixed = gate_cmp out_cmp + gate_slc out_slc + gate_win out_win over flat rows."""
    o_row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    m_row = o_row < num_rows
    gate_cmp = tl.load(gates + o_row * 3, mask=m_row, other=0.0).to(tl.float32)
    gate_slc = tl.load(gates + o_row * 3 + 1, mask=m_row, other=0.0).to(tl.float32)
    gate_win = tl.load(gates + o_row * 3 + 2, mask=m_row, other=0.0).to(tl.float32)
    b_cmp = load_rows(out_cmp, o_row * V, m_row, 0, V_PADDED, V, True).to(tl.float32)
    b_slc = load_rows(out_slc, o_row * V, m_row, 0, V_PADDED, V, True).to(tl.float32)
    b_win = load_rows(out_win, o_row * V, m_row, 0, V_PADDED, V, True).to(tl.float32)
    b_mixed = b_cmp * gate_cmp[:, None] + b_slc * gate_slc[:, None] + b_win * gate_win[:, None]
    store_rows(mixed, b_mixed, o_row * V, m_row, 0, V_PADDED, V)


@triton.jit
def _branch_gradient(
    b_dout,
    out,
    lse,
    gates,
    dgates,
    gated_lse,
    deltas,
    num_rows,
    o_row,
    m_row,
    BRANCH: tl.constexpr,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
):
    """Write one branch's dgate, its lse less the log of its gate, and its delta."""
    b_out = load_rows(out, o_row * V, m_row, 0, V_PADDED, V, True).to(tl.float32)
    b_delta = tl.sum(b_dout * b_out, 1)
    b_gate = tl.load(gates + o_row * 3 + BRANCH, mask=m_row, other=1.0).to(tl.float32)
    b_lse = tl.load(lse + o_row, mask=m_row, other=0.0)
    # A gate of 0 makes lse +inf, and so every probability 0; a row without keys stays at -inf. What
    # a negative gate would need cannot be said so: NaN shows it.
    b_gated = b_lse - tl.log2(tl.where(b_gate > 0.0, b_gate, 1.0)) * LN_2
    b_closed = tl.where(b_gate == 0.0, float("inf"), float("nan"))
    b_gated = tl.where(b_gate > 0.0, b_gated, b_closed)
    tl.store(dgates + o_row * 3 + BRANCH, b_delta.to(dgates.dtype.element_ty), mask=m_row)
    o_branch = o_row + BRANCH * num_rows.to(tl.int64)
    tl.store(gated_lse + o_branch, b_gated, mask=m_row)
    tl.store(deltas + o_branch, b_delta, mask=m_row)


@triton.jit(do_not_specialize=["num_rows"])
def mix_backward_kernel(
    dout,
    out_cmp,
    out_slc,
    out_win,
    lse_cmp,
    lse_slc,
    lse_win,
    gates,
    dgates,
    gated_lse,
    deltas,
    num_rows,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """dgates, gated lse and deltas of the three branches over flat rows."""
    o_row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    m_row = o_row < num_rows
    b_dout = load_rows(dout, o_row * V, m_row, 0, V_PADDED, V, True).to(tl.float32)
    _branch_gradient(
        b_dout, out_cmp, lse_cmp, gates, dgates, gated_lse, deltas, num_rows, o_row, m_row,
        0, V, V_PADDED,
    )  # fmt: skip
    _branch_gradient(
        b_dout, out_slc, lse_slc, gates, dgates, gated_lse, deltas, num_rows, o_row, m_row,
        1, V, V_PADDED,
    )  # fmt: skip
    _branch_gradient(
        b_dout, out_win, lse_win, gates, dgates, gated_lse, deltas, num_rows, o_row, m_row,
        2, V, V_PADDED,
    )  # fmt: skip
