"""Folds the blocks that new tokens complete and writes them into pages: two launches, often idle.

A decode step completes a block once in d tokens; programs whose blocks are none end at once. The
first launch splits a block's tokens over programs, so that the matrix of phi is read by many; the
second adds their parts, corrects, rotates the keys and writes.
"""

# Jitted functions and their launches have no types that a checker knows.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.new_rows import NewBlocks, Phi
from nsa_kernels.triton_backend.tiles import (
    EARLY_BLOCKS,
    await_launch,
    early_start,
    let_next_start,
)

# Blocks of a tile: the least rows of a matrix product.
_TILE_E = 16
_MOST_SPLITS = 16
# Bytes of a tile of phi's matrices: two of them fit beside what else a program holds.
_MATRIX_BYTES = 64 * 2**10


def fold_and_write(
    phis: tuple[Phi, Phi],
    tails: tuple[Tensor, Tensor],
    caches: tuple[Tensor, Tensor],
    new: NewBlocks,
) -> None:
    """Compressed keys and values are written."""
    num_blocks, size = new.tail_rows.shape
    if num_blocks == 0:
        return
    phi, (k_tail, v_tail), (k_cmp, v_cmp) = phis[0], tails, caches
    num_groups, key_width, value_width = *k_tail.shape[2:], v_tail.shape[3]
    padded = triton.next_power_of_2(max(key_width, value_width))
    splits = min(_MOST_SPLITS, size)
    tiles = triton.cdiv(num_blocks, _TILE_E)
    columns = min(padded, _MATRIX_BYTES // (padded * k_tail.itemsize))
    kind = 0 if phi.fold is None else 1 if phi.correct is None else 2
    # What a kind does not have is never read.
    folds, positions, corrects = (
        [k_tail if tensor is None else tensor for tensor in tensors]
        for tensors in (
            [one.fold for one in phis],
            [one.position for one in phis],
            [one.correct for one in phis],
        )
    )
    parts = torch.empty(
        2, splits, tiles * _TILE_E, 2 * num_groups, padded,
        dtype=torch.float32, device=k_tail.device,
    )  # fmt: skip
    options = early_start(k_tail.device)
    sizes = {
        "G": num_groups,
        "SIZE": size,
        "PADDED": padded,
        "TILE_N": columns,
        "SPLITS": splits,
        "TILE_E": _TILE_E,
        "KIND": kind,
        "PRECISION": "ieee" if k_tail.dtype == torch.float32 else "tf32",
        "STARTS_EARLY": bool(options),
        "num_warps": 4,
        **options,
    }
    paged_fold_kernel[(tiles, 2 * num_groups, splits * (padded // columns))](
        k_tail, v_tail, *positions, *folds, new.tail_rows, new.rows, parts, num_blocks,
        key_width, value_width, **sizes,
    )  # fmt: skip
    paged_fold_write_kernel[(tiles, 2 * num_groups)](
        parts, *corrects, new.rows, new.cos, new.sin, k_cmp, v_cmp, num_blocks,
        key_width, value_width, **sizes,
        IS_ROTATED=new.is_rotated,
        LETS_START=bool(options) and num_blocks <= EARLY_BLOCKS.value,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_blocks"])
def paged_fold_kernel(
    k_tail,
    v_tail,
    k_position,
    v_position,
    k_fold,
    v_fold,
    tail_rows,
    rows,
    parts,
    num_blocks,
    key_width,
    value_width,
    G: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    TILE_N: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_E: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    STARTS_EARLY: tl.constexpr,
):
    """Some columns of the products and sums of some tokens of a tile of blocks, of the keys or the
    values of a group.

    parts [2, SPLITS, blocks, 2 G, PADDED]: products with phi's matrix, and plain sums.
    """
    let_next_start(STARTS_EARLY)
    i_tile = tl.program_id(0)
    i_group = tl.program_id(1) // 2
    i_split = tl.program_id(2) % SPLITS
    o_out = tl.program_id(2) // SPLITS * TILE_N + tl.arange(0, TILE_N)
    o_block = i_tile * TILE_E + tl.arange(0, TILE_E)
    # Rows are as old as the step: a step without blocks waits for nothing else.
    row = tl.load(rows + o_block, o_block < num_blocks, 0)
    m_block = row > 0
    has_block = tl.max(row, 0) > 0
    await_launch(STARTS_EARLY)
    if not has_block:
        return
    tail, position, fold, width = k_tail, k_position, k_fold, key_width
    if tl.program_id(1) % 2 == 1:
        tail, position, fold, width = v_tail, v_position, v_fold, value_width
    o_in = tl.arange(0, PADDED)
    m_in, m_out = o_in < width, o_out < width
    b_fold = tl.zeros([TILE_E, TILE_N], tl.float32)
    b_sum = tl.zeros([TILE_E, TILE_N], tl.float32)
    for i_token in range(i_split * SIZE // SPLITS, (i_split + 1) * SIZE // SPLITS):
        tail_row = tl.load(tail_rows + o_block.to(tl.int64) * SIZE + i_token, m_block, 0)
        p_tail = tail + ((tail_row * G + i_group) * width)[:, None]
        b_own = tl.load(p_tail + o_out[None, :], m_block[:, None] & m_out[None, :], 0.0)
        b_sum += b_own.to(tl.float32)
        if KIND > 0:
            b_tail = tl.load(p_tail + o_in[None, :], m_block[:, None] & m_in[None, :], 0.0)
            i_place = i_group * SIZE + i_token
            b_position = tl.load(position + i_place * width + o_in, m_in, 0.0)
            b_placed = b_tail + b_position.to(b_tail.dtype)[None, :]
            o_fold = (i_place * width + o_in)[:, None].to(tl.int64) * width + o_out[None, :]
            b_matrix = tl.load(fold + o_fold, m_in[:, None] & m_out[None, :], 0.0)
            b_fold = tl.dot(b_placed, b_matrix.to(b_tail.dtype), b_fold, input_precision=PRECISION)
    NUM_ROWS = tl.num_programs(0) * TILE_E
    o_row = (i_split * NUM_ROWS + o_block).to(tl.int64) * (2 * G) + tl.program_id(1)
    p_part = parts + o_row[:, None] * PADDED + o_out[None, :]
    if KIND > 0:
        tl.store(p_part, b_fold)
    stride = tl.full([], SPLITS * 2 * G * PADDED, tl.int64) * NUM_ROWS
    tl.store(p_part + stride, b_sum)


@triton.jit
def sum_parts(
    p_parts,
    split_stride,
    FIRST: tl.constexpr,
    TILE_E: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Columns from FIRST on of the parts of a tile of blocks, added in the order of the splits."""
    b_sum = tl.zeros([TILE_E, COLUMNS], tl.float32)
    o_column = FIRST + tl.arange(0, COLUMNS)
    for i_split in range(SPLITS):
        b_sum += tl.load(p_parts[:, None] + i_split * split_stride + o_column[None, :])
    return b_sum


@triton.jit(do_not_specialize=["num_blocks"])
def paged_fold_write_kernel(
    parts,
    k_correct,
    v_correct,
    rows,
    cos,
    sin,
    k_cmp,
    v_cmp,
    num_blocks,
    key_width,
    value_width,
    G: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    TILE_N: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_E: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    STARTS_EARLY: tl.constexpr,
    LETS_START: tl.constexpr,
    IS_ROTATED: tl.constexpr,
):
    """Add the parts of a tile of blocks, correct, rotate the keys, and write them.

    Rounds to the caches' precision where new_rows.fold_blocks does.
    """
    let_next_start(LETS_START)
    i_tile = tl.program_id(0)
    i_group = tl.program_id(1) // 2
    is_value = tl.program_id(1) % 2 == 1
    o_block = i_tile * TILE_E + tl.arange(0, TILE_E)
    row = tl.load(rows + o_block, o_block < num_blocks, 0)
    m_block = row > 0
    has_block = tl.max(row, 0) > 0
    await_launch(STARTS_EARLY)
    if not has_block:
        return
    correct, cache, width = k_correct, k_cmp, key_width
    if is_value:
        correct, cache, width = v_correct, v_cmp, value_width
    o_in = tl.arange(0, PADDED)
    m_in = o_in < width
    DTYPE: tl.constexpr = k_cmp.dtype.element_ty
    split_stride = tl.full([], 2 * G * PADDED, tl.int64) * (tl.num_programs(0) * TILE_E)
    p_folds = parts + (o_block.to(tl.int64) * (2 * G) + tl.program_id(1)) * PADDED
    p_sums = p_folds + SPLITS * split_stride
    if KIND == 1:
        b_out = sum_parts(p_folds, split_stride, 0, TILE_E, PADDED, SPLITS).to(DTYPE)
    else:
        b_out = (sum_parts(p_sums, split_stride, 0, TILE_E, PADDED, SPLITS) / SIZE).to(DTYPE)
    if KIND == 2:
        b_change = tl.zeros([TILE_E, PADDED], tl.float32)
        for first in tl.static_range(0, PADDED, TILE_N):
            b_fold = sum_parts(p_folds, split_stride, first, TILE_E, TILE_N, SPLITS)
            b_fold = b_fold.to(DTYPE).to(tl.float32)
            b_hidden = (b_fold * tl.sigmoid(b_fold)).to(DTYPE)
            o_hidden = first + tl.arange(0, TILE_N)
            p_correct = correct + (i_group * width + o_hidden)[:, None] * width + o_in[None, :]
            m_correct = (o_hidden < width)[:, None] & m_in[None, :]
            b_correct = tl.load(p_correct, m_correct, 0.0).to(DTYPE)
            b_change = tl.dot(b_hidden, b_correct, b_change, input_precision=PRECISION)
        b_out = (b_out.to(tl.float32) + b_change.to(DTYPE).to(tl.float32)).to(DTYPE)
    if IS_ROTATED:
        if is_value == 0:
            half = width // 2
            o_other = tl.where(o_in < half, o_in + half, tl.maximum(o_in - half, 0))
            o_other = tl.minimum(o_other, PADDED - 1)[None, :] + tl.zeros(
                [TILE_E, PADDED], tl.int32
            )
            b_own = b_out.to(tl.float32)
            b_other = tl.gather(b_own, o_other, 1)
            o_angle = o_block[:, None] * half + tl.where(o_in < half, o_in, o_in - half)[None, :]
            m_angle = m_block[:, None] & m_in[None, :]
            b_cos = tl.load(cos + o_angle, m_angle, 0.0)
            b_sin = tl.load(sin + o_angle, m_angle, 0.0)
            b_sin = tl.where((o_in < half)[None, :], -b_sin, b_sin)
            b_out = (b_own * b_cos + b_other * b_sin).to(DTYPE)
    p_cache = cache + (row[:, None] * G + i_group) * width + o_in[None, :]
    tl.store(p_cache, b_out, m_block[:, None] & m_in[None, :])
