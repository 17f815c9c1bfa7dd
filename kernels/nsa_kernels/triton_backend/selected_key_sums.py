"""Gradients of keys and values while they grow, range after range, in fp32.

A list of one chunk adds to its block's rows itself. Long lists leave a part for each chunk, which
one more kernel adds in the order of the list.
"""

# Jitted functions and their launches have no types that a checker knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.triton_backend.selected_by_block import find_block
from nsa_kernels.triton_backend.tiles import load_rows, store_rows


@dataclass(frozen=True, slots=True)
class KeySums:
    """Gradients of keys and values while they grow, in fp32."""

    k: Tensor
    """[T, G, K]"""
    v: Tensor
    """[T, G, V]"""
    parts_k: Tensor
    """[slots, l', K], what the chunks of a long list add."""
    parts_v: Tensor
    """[slots, l', V]"""

    @classmethod
    def empty(cls, k: Tensor, v: Tensor, slots: int, block: int) -> "KeySums":
        """Sums of nothing yet."""
        sums = [torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (k, v)]
        parts = [t.new_empty(slots, block, t.shape[2]) for t in sums]
        return cls(*sums, *parts)


@triton.jit
def grow_rows(
    sums, b_tile, o_row, m_row, FIRST: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr
):
    """Add b_tile to rows of an fp32 sum that no other program of the launch touches."""
    b_before = load_rows(sums, o_row, m_row, FIRST, SPAN, WIDTH, True)
    store_rows(sums, b_before + b_tile, o_row, m_row, FIRST, SPAN, WIDTH)


@triton.jit
def _sum_parts(
    parts,
    slot,
    count,
    o_tile,
    m_key,
    FIRST: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    SELECTION_BLOCK: tl.constexpr,
    TILE_KEYS: tl.constexpr,
):
    """Partial sums of one key tile, added chunk after chunk."""
    b_sum = tl.zeros([TILE_KEYS, SPAN], tl.float32)
    stride = tl.full([], SELECTION_BLOCK * WIDTH, tl.int64)
    p_first = parts + slot * stride + tl.program_id(1) * (TILE_KEYS * WIDTH)
    for i_part in range(0, count):
        p_part = p_first + i_part * stride
        b_sum += load_rows(p_part, o_tile * WIDTH, m_key, FIRST, SPAN, WIDTH, True)
    return b_sum


@triton.jit(do_not_specialize=["num_sequences", "num_blocks"])
def selected_backward_sum_kernel(
    sum_k,
    sum_v,
    parts_k,
    parts_v,
    chunk_starts,
    slots,
    cu_seqlens,
    num_sequences,
    num_blocks,
    G: tl.constexpr,
    SELECTION_BLOCK: tl.constexpr,
    K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_TAIL: tl.constexpr,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
    TILE_KEYS: tl.constexpr,
):
    """dk and dv of one key tile whose list has several chunks in this range."""
    i_list = tl.program_id(0)
    slot = tl.load(slots + i_list)
    if slot < 0:
        return
    count = tl.load(chunk_starts + i_list + 1) - tl.load(chunk_starts + i_list)
    start, first_key, key_end = find_block(
        cu_seqlens, num_sequences, i_list % num_blocks, SELECTION_BLOCK, TILE_KEYS
    )
    o_tile = tl.arange(0, TILE_KEYS)
    m_key = first_key + o_tile < key_end
    key_row = (start + first_key).to(tl.int64) * G + i_list // num_blocks
    o_key = o_tile * (G * K)
    b_dk = _sum_parts(parts_k, slot, count, o_tile, m_key, 0, K_MAIN, K, SELECTION_BLOCK, TILE_KEYS)
    grow_rows(sum_k + key_row * K, b_dk, o_key, m_key, 0, K_MAIN, K)
    b_dv = _sum_parts(
        parts_v, slot, count, o_tile, m_key, 0, V_PADDED, V, SELECTION_BLOCK, TILE_KEYS
    )
    grow_rows(sum_v + key_row * V, b_dv, o_tile * (G * V), m_key, 0, V_PADDED, V)
    if K_TAIL > 0:
        b_tail = _sum_parts(
            parts_k, slot, count, o_tile, m_key, K_MAIN, K_TAIL, K, SELECTION_BLOCK, TILE_KEYS
        )
        grow_rows(sum_k + key_row * K, b_tail, o_key, m_key, K_MAIN, K_TAIL, K)
