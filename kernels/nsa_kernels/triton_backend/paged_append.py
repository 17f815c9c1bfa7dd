"""Rotates the queries and keys of new tokens and writes keys and values into pages, in one launch.

A program takes one token and one piece: some heads of the query, or the keys or the values of one
branch. Nothing is read twice, and nothing but the rotated query is written besides the caches.
"""

# Jitted functions and their launches have no types that a checker knows.
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.new_rows import NewRows
from nsa_kernels.triton_backend.tiles import await_launch, early_start, let_next_start

# Heads of the query that a program turns.
_QUERY_HEADS = 8


def rotate_and_write(q: Tensor, branches: Sequence[NewRows], cos: Tensor, sin: Tensor) -> Tensor:
    """The rotated q; keys and values are written."""
    num_tokens, num_heads, key_width = q.shape
    num_groups, value_width = branches[0].values.shape[1:]
    turned = torch.empty_like(q, memory_format=torch.contiguous_format)
    if num_tokens == 0:
        return turned
    # Branches that are not there repeat the first: no program takes them.
    first, second, third = (*branches, branches[0], branches[0])[:3]
    sources = [_by_rows(t) for one in (first, second, third) for t in (one.keys, one.values)]
    query = _by_rows(q)
    query_tiles = triton.cdiv(num_heads, _QUERY_HEADS)
    options = early_start(q.device)
    paged_append_kernel[(num_tokens, query_tiles + 2 * len(branches))](
        query, turned, *sources,
        *[t for one in (first, second, third) for t in (one.k_cache, one.v_cache)],
        first.rows, second.rows, third.rows, cos, sin,
        query.stride(0), *[t.stride(0) for t in sources],
        H=num_heads,
        G=num_groups,
        K=key_width,
        V=value_width,
        HALF_PADDED=triton.next_power_of_2(key_width // 2),
        V_PADDED=triton.next_power_of_2(value_width),
        TILE_H=_QUERY_HEADS,
        GROUPS_PADDED=triton.next_power_of_2(num_groups),
        IS_ROTATED_0=first.is_rotated,
        IS_ROTATED_1=second.is_rotated,
        IS_ROTATED_2=third.is_rotated,
        STARTS_EARLY=bool(options),
        num_warps=1,
        **options,
    )  # fmt: skip
    return turned


def _by_rows(x: Tensor) -> Tensor:
    """x [T, heads, W] with heads and channels side by side in a row, wherever the rows lie."""
    is_dense = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return x if is_dense else x.contiguous()


@triton.jit
def as_cached(x, source, target):
    """x, computed from the source's numbers, as the target keeps it: through the source's dtype.

    What is too large for fp8 becomes its largest: fp8 has no infinity, and NaN would spread.
    """
    x = x.to(source.dtype.element_ty)
    if target.dtype.element_ty == tl.float8e4nv:
        x = tl.clamp(x.to(tl.float32), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(target.dtype.element_ty)


@triton.jit
def turn_row(
    source,
    target,
    p_cos,
    p_sin,
    o_head,
    m_head,
    K: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    IS_ROTATED: tl.constexpr,
):
    """Copy heads [heads, K] of one token, each turned by the token's angles."""
    HALF: tl.constexpr = K // 2
    o_half = tl.arange(0, HALF_PADDED)
    m_half = o_half < HALF
    o_first = o_head[:, None] * K + o_half[None, :]
    m_first = m_head[:, None] & m_half[None, :]
    first = tl.load(source + o_first, m_first, 0.0)
    second = tl.load(source + o_first + HALF, m_first, 0.0)
    if IS_ROTATED:
        cos = tl.load(p_cos + o_half, m_half, 0.0)[None, :]
        sin = tl.load(p_sin + o_half, m_half, 0.0)[None, :]
        first, second = first.to(tl.float32), second.to(tl.float32)
        first, second = first * cos - second * sin, second * cos + first * sin
    tl.store(target + o_first, as_cached(first, source, target), m_first)
    tl.store(target + o_first + HALF, as_cached(second, source, target), m_first)


@triton.jit
def write_branch(
    keys,
    values,
    k_cache,
    v_cache,
    rows,
    p_cos,
    p_sin,
    k_stride,
    v_stride,
    i_token,
    is_value,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    V_PADDED: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    IS_ROTATED: tl.constexpr,
):
    """Write the keys, or the values, of one token and branch."""
    o_group = tl.arange(0, GROUPS_PADDED)
    m_group = o_group < G
    row = tl.load(rows + i_token)
    if is_value:
        o_v = tl.arange(0, V_PADDED)
        o_value = o_group[:, None] * V + o_v[None, :]
        m_value = m_group[:, None] & (o_v < V)[None, :]
        b_value = tl.load(values + i_token * v_stride + o_value, m_value, 0.0)
        tl.store(v_cache + row * (G * V) + o_value, as_cached(b_value, values, v_cache), m_value)
    else:
        turn_row(
            keys + i_token * k_stride, k_cache + row * (G * K), p_cos, p_sin, o_group, m_group,
            K, HALF_PADDED, IS_ROTATED,
        )  # fmt: skip


@triton.jit
def paged_append_kernel(
    q,
    turned,
    keys_0,
    values_0,
    keys_1,
    values_1,
    keys_2,
    values_2,
    k_cache_0,
    v_cache_0,
    k_cache_1,
    v_cache_1,
    k_cache_2,
    v_cache_2,
    rows_0,
    rows_1,
    rows_2,
    cos,
    sin,
    q_stride,
    k_stride_0,
    v_stride_0,
    k_stride_1,
    v_stride_1,
    k_stride_2,
    v_stride_2,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    V_PADDED: tl.constexpr,
    TILE_H: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    IS_ROTATED_0: tl.constexpr,
    IS_ROTATED_1: tl.constexpr,
    IS_ROTATED_2: tl.constexpr,
    STARTS_EARLY: tl.constexpr,
):
    """One piece of one token: heads of the query first, then keys and values branch by branch."""
    QUERY_TILES: tl.constexpr = (H + TILE_H - 1) // TILE_H
    let_next_start(STARTS_EARLY)
    await_launch(STARTS_EARLY)
    i_token = tl.program_id(0).to(tl.int64)
    i_piece = tl.program_id(1)
    p_cos, p_sin = cos + i_token * (K // 2), sin + i_token * (K // 2)
    if i_piece < QUERY_TILES:
        o_head = i_piece * TILE_H + tl.arange(0, TILE_H)
        turn_row(
            q + i_token * q_stride, turned + i_token * (H * K), p_cos, p_sin, o_head, o_head < H,
            K, HALF_PADDED, True,
        )  # fmt: skip
    else:
        i_part = i_piece - QUERY_TILES
        is_value = i_part % 2 == 1
        if i_part // 2 == 0:
            write_branch(
                keys_0, values_0, k_cache_0, v_cache_0, rows_0, p_cos, p_sin, k_stride_0,
                v_stride_0, i_token, is_value,
                G, K, V, HALF_PADDED, V_PADDED, GROUPS_PADDED, IS_ROTATED_0,
            )  # fmt: skip
        elif i_part // 2 == 1:
            write_branch(
                keys_1, values_1, k_cache_1, v_cache_1, rows_1, p_cos, p_sin, k_stride_1,
                v_stride_1, i_token, is_value,
                G, K, V, HALF_PADDED, V_PADDED, GROUPS_PADDED, IS_ROTATED_1,
            )  # fmt: skip
        else:
            write_branch(
                keys_2, values_2, k_cache_2, v_cache_2, rows_2, p_cos, p_sin, k_stride_2,
                v_stride_2, i_token, is_value,
                G, K, V, HALF_PADDED, V_PADDED, GROUPS_PADDED, IS_ROTATED_2,
            )  # fmt: skip
