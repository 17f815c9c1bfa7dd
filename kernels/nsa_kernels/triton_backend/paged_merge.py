"""Join the parts that the paged kernels leave and weigh the branches by their gates (Eq. 5)."""

# Jitted functions and their launches have no types that a checker knows.
# pyright: reportArgumentType=false, reportCallIssue=false

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.triton_backend.tiles import await_launch, let_next_start

# Few rows are cut into columns, of which one warp holds all parts and waits for no other.
_FEW_PROGRAMS = 1024
_FEW_COLUMNS = 32
# Fewer parts are as fast in the same kernel, which a server compiles only once.
_LEAST_PARTS = {True: 16, False: 8}


def merge_parts(
    partial_out: Tensor,
    partial_lse: Tensor,
    splits: tuple[int, int, int],
    gates: Tensor | None,
    out: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    rows: tuple[Tensor, Tensor] | None = None,
    early: dict[str, bool] | None = None,
) -> None:
    """Join partial_out [rows, H, parts, V] by partial_lse [rows, H, parts] into out [T, H, V].

    Args:
        splits: parts of the compressed, the selected and the sliding branch, in this order.
        gates: [T, H, 3]; None if all parts are of one branch.
        cu_seqlens: int32 [B + 1]; rows are then the packed tokens, and those past its end get 0.
        early: tiles.early_start, if the launch before lets this one start.
        rows: position (-1 for none) and packed token of each row, where rows are not the tokens.
    """
    num_rows, num_heads, num_parts, value_width = partial_out.shape
    padded = triton.next_power_of_2(value_width)
    is_few = rows is None and num_rows * num_heads < _FEW_PROGRAMS
    columns = min(padded, _FEW_COLUMNS) if is_few else padded
    positions, tokens = (None, None) if rows is None else rows
    paged_merge_kernel[(num_rows, num_heads, triton.cdiv(value_width, columns))](
        partial_out, partial_lse, gates, positions, tokens, cu_seqlens, out,
        0 if cu_seqlens is None else cu_seqlens.numel() - 1,
        num_heads,
        *splits,
        V=value_width,
        TILE_V=columns,
        SPLITS_PADDED=max(_LEAST_PARTS[is_few], triton.next_power_of_2(num_parts)),
        STARTS_EARLY=bool(early),
        num_warps=1 if num_parts * columns <= 1024 else 4,
        **(early or {}),
    )  # fmt: skip


@triton.jit
def part_weights(b_lse, o_branch, i_branch, b_gate):
    """[parts]: gate * softmax of lse within each part's branch; zero for parts without keys.

    i_branch [parts] is the branch of each part, b_gate belongs to the branches o_branch. All
    branches are reduced at once, for each reduction waits for all threads.
    """
    m_part = o_branch[:, None] == i_branch[None, :]
    b_lse = tl.where(m_part, b_lse[None, :], -float("inf"))
    largest = tl.max(b_lse, 1)
    largest = tl.where(largest == -float("inf"), 0.0, largest)
    b_p = tl.exp(b_lse - largest[:, None])
    total = tl.sum(b_p, 1)
    return tl.sum(b_p * (b_gate / tl.where(total == 0.0, 1.0, total))[:, None], 0)


@triton.jit(do_not_specialize=["num_sequences", "SPLITS_CMP", "SPLITS_SLC", "SPLITS_WIN"])
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
    SPLITS_CMP,
    SPLITS_SLC,
    SPLITS_WIN,
    V: tl.constexpr,
    TILE_V: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    STARTS_EARLY: tl.constexpr,
):
    """Write TILE_V columns of a row and head of out [T, H, V].

    Without gates all parts are of one branch. row_positions and row_tokens say where a row belongs;
    without them rows are the packed tokens, of which those past the last sequence get 0.
    """
    let_next_start(STARTS_EARLY)
    i_row = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1)
    ALL_SPLITS = SPLITS_CMP + SPLITS_SLC + SPLITS_WIN
    o_split = tl.arange(0, SPLITS_PADDED)
    o_v = tl.program_id(2) * TILE_V + tl.arange(0, TILE_V)
    if row_positions is None:
        i_out = i_row * H + i_head
        if i_row >= tl.load(cu_seqlens + num_sequences):
            await_launch(STARTS_EARLY)
            b_zero = tl.zeros([TILE_V], tl.float32)
            tl.store(out + i_out * V + o_v, b_zero.to(out.dtype.element_ty), o_v < V)
            return
    else:
        if tl.load(row_positions + i_row) < 0:
            return
        i_out = tl.load(row_tokens + i_row).to(tl.int64) * H + i_head
    o_part = (i_row * H + i_head) * ALL_SPLITS + o_split
    m_part = o_split < ALL_SPLITS
    o_branch = tl.arange(0, 4)
    i_branch = o_split * 0
    b_gate = tl.where(o_branch == 0, 1.0, 0.0)
    if gates is not None:
        i_branch += (o_split >= SPLITS_CMP).to(tl.int32)
        i_branch += (o_split >= SPLITS_CMP + SPLITS_SLC).to(tl.int32)
        b_gate = tl.load(gates + i_out * 3 + o_branch, o_branch < 3, 0.0).to(tl.float32)
    # Gates are as old as the projections, and the launch before has waited for those.
    await_launch(STARTS_EARLY)
    b_lse = tl.load(partial_lse + o_part, m_part, -float("inf"))
    p_partial = partial_out + o_part[:, None] * V + o_v[None, :]
    b_partial = tl.load(p_partial, m_part[:, None] & (o_v < V)[None, :], 0.0)
    # Parts without keys were never written.
    b_partial = tl.where((b_lse > -float("inf"))[:, None], b_partial, 0.0)
    weight = part_weights(b_lse, o_branch, i_branch, b_gate)
    b_out = tl.sum(b_partial * weight[:, None], 0)
    tl.store(out + i_out * V + o_v, b_out.to(out.dtype.element_ty), o_v < V)
