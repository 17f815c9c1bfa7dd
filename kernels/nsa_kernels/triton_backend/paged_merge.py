"""Join the parts that the paged kernels leave and weigh the branches by their gates (Eq. 5)."""

import triton
import triton.language as tl


@triton.jit
def branch_weights(b_lse, m_part, gate):
    """Weights of a branch's parts: gate * softmax of their lse; zero for parts without keys."""
    b_lse = tl.where(m_part, b_lse, -float("inf"))
    largest = tl.max(b_lse, 0)
    largest = tl.where(largest == -float("inf"), 0.0, largest)
    b_p = tl.exp(b_lse - largest)
    total = tl.sum(b_p, 0)
    return b_p * (gate / tl.where(total == 0.0, 1.0, total))


@triton.jit
def paged_merge_kernel(
    partial_out,
    partial_lse,
    gates,
    row_positions,
    row_tokens,
    cu_seqlens,
    out,
    num_sequences,
    H,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
    SPLITS_CMP: tl.constexpr,
    SPLITS_SLC: tl.constexpr,
    SPLITS_WIN: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
):
    """Write one row and head of out [T, H, V]; without gates all parts are of one branch.

    row_positions and row_tokens say where a row belongs. Without them rows are the packed tokens,
    of which those past the last sequence get 0.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1)
    ALL_SPLITS: tl.constexpr = SPLITS_CMP + SPLITS_SLC + SPLITS_WIN
    o_split = tl.arange(0, SPLITS_PADDED)
    o_v = tl.arange(0, V_PADDED)
    if row_positions is None:
        i_out = i_row * H + i_head
        if i_row >= tl.load(cu_seqlens + num_sequences):
            b_zero = tl.zeros([V_PADDED], tl.float32)
            tl.store(out + i_out * V + o_v, b_zero.to(out.dtype.element_ty), o_v < V)
            return
    else:
        if tl.load(row_positions + i_row) < 0:
            return
        i_out = tl.load(row_tokens + i_row).to(tl.int64) * H + i_head
    o_part = (i_row * H + i_head) * ALL_SPLITS + o_split
    b_lse = tl.load(partial_lse + o_part, o_split < ALL_SPLITS, -float("inf"))
    # Parts without keys were never written.
    b_partial = tl.load(
        partial_out + o_part[:, None] * V + o_v[None, :],
        (b_lse > -float("inf"))[:, None] & (o_v[None, :] < V),
        0.0,
    )
    if gates is None:
        weight = branch_weights(b_lse, o_split < ALL_SPLITS, 1.0)
    else:
        end_slc: tl.constexpr = SPLITS_CMP + SPLITS_SLC
        gate_cmp = tl.load(gates + i_out * 3).to(tl.float32)
        gate_slc = tl.load(gates + i_out * 3 + 1).to(tl.float32)
        gate_win = tl.load(gates + i_out * 3 + 2).to(tl.float32)
        weight = branch_weights(b_lse, o_split < SPLITS_CMP, gate_cmp)
        weight += branch_weights(b_lse, (o_split >= SPLITS_CMP) & (o_split < end_slc), gate_slc)
        weight += branch_weights(b_lse, o_split >= end_slc, gate_win)
    b_out = tl.sum(b_partial * weight[:, None], 0)
    tl.store(out + i_out * V + o_v, b_out.to(out.dtype.element_ty), o_v < V)
