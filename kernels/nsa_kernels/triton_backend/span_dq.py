"""Gradient of the queries of span attention: the forward's walk over keys with the saved lse."""

# Jitted functions and their launches have no types that a checker knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.packing import num_tiles
from nsa_kernels.triton_backend.span_forward import Span
from nsa_kernels.triton_backend.tiles import (
    Tiles,
    descriptors,
    find_tile,
    fp32_tiles,
    key_widths,
    load_rows,
    log2_scale,
    log2_sum,
    store_rows,
    value_widths,
    visible_high,
    visible_low,
)


def span_dq(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    cu_seqlens: Tensor,
    span: Span,
    scale: float,
) -> Tensor:
    """dq [T, H, K]; the arguments are span_backward.span_gradients'."""
    num_tokens, num_heads, key_width = q.shape
    _, num_groups, value_width = v.shape
    heads_per_group = num_heads // num_groups
    tiles = dq_tiles(q.dtype, key_width, value_width, heads_per_group)
    num_sequences = cu_seqlens.numel() - 1
    dq = torch.empty_like(q)
    # Windows are too short to gain by copies.
    k_descriptor, v_descriptor = None, None
    if not span.window:
        k_descriptor, v_descriptor = descriptors(tiles.keys, k, v)
    grid = (num_tiles(num_tokens, num_sequences, tiles.rows // heads_per_group), num_groups)
    span_backward_dq_kernel[grid](
        q, k, v, k_descriptor, v_descriptor, dout, lse, delta, dq, cu_seqlens, span.cu_keys,
        num_sequences, log2_scale(scale), scale,
        G=num_groups,
        R=heads_per_group,
        **key_widths(key_width),
        **value_widths(value_width),
        **span.constants,
        PRECISION=tiles.precision,
        TILE_ROWS=tiles.rows,
        TILE_KEYS=tiles.keys,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
    return dq


def dq_tiles(dtype: torch.dtype, key_width: int, value_width: int, heads_per_group: int) -> Tiles:
    """Tile sizes of the dq pass: q, dout and dq stay, keys and values stream.

    Up to width 128 two programs of four warps fit a multiprocessor: products of one run beside
    exponentials of the other.
    """
    width = max(key_width, value_width)
    if dtype == torch.float32:
        return fp32_tiles(key_width, value_width, max(32, heads_per_group))
    if width <= 64:
        return Tiles(128, 64, 8, 3)
    if width <= 128:
        return Tiles(64, 64, 4, 2)
    if width <= 192:
        return Tiles(128, 64, 8, 2)
    return Tiles(64, 64, 8, 2)


@triton.jit
def _walk_keys(
    b_dq,
    b_dq_tail,
    b_q,
    b_q_tail,
    b_dout,
    b_lse,
    b_delta,
    p_k,
    p_v,
    k_descriptor,
    v_descriptor,
    key_start,
    i_group,
    first,
    end,
    key_end,
    o_low,
    o_high,
    scale_log2,
    G: tl.constexpr,
    K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_TAIL: tl.constexpr,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the key tiles of [first, end) to dq / scale.

    Descriptors are None or used where not MASKED.
    """
    HAS_DESCRIPTORS: tl.constexpr = not MASKED and k_descriptor is not None
    o_tile = tl.arange(0, TILE_KEYS)
    k_stride = tl.full([], G * K, tl.int64)
    v_stride = tl.full([], G * V, tl.int64)
    for i_key in range(first, end, TILE_KEYS):
        o_key = i_key + o_tile
        m_key = o_key < key_end
        if HAS_DESCRIPTORS:
            b_k = k_descriptor.load([key_start + i_key, i_group * K])
        else:
            b_k = load_rows(p_k + i_key * k_stride, o_tile * (G * K), m_key, 0, K_MAIN, K, MASKED)
        b_logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if K_TAIL > 0:
            b_k_tail = load_rows(
                p_k + i_key * k_stride, o_tile * (G * K), m_key, K_MAIN, K_TAIL, K, MASKED
            )
            b_logits = tl.dot(b_q_tail, tl.trans(b_k_tail), b_logits, input_precision=PRECISION)
        # Asked for before the exponentials, so that the products run beside them.
        if HAS_DESCRIPTORS:
            b_v = v_descriptor.load([key_start + i_key, i_group * V])
        else:
            b_v = load_rows(p_v + i_key * v_stride, o_tile * (G * V), m_key, 0, V_PADDED, V, MASKED)
        b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION)
        if MASKED:
            m_seen = (o_key[None, :] >= o_low[:, None]) & (o_key[None, :] < o_high[:, None])
            b_logits = tl.where(m_seen, b_logits, float("-inf"))
        b_p = tl.exp2(b_logits * scale_log2 - b_lse[:, None])
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)
        if K_TAIL > 0:
            b_dq_tail = tl.dot(b_ds, b_k_tail, b_dq_tail, input_precision=PRECISION)
    return b_dq, b_dq_tail


@triton.jit(do_not_specialize=["num_sequences"])
def span_backward_dq_kernel(
    q,
    k,
    v,
    k_descriptor,
    v_descriptor,
    dout,
    lse,
    delta,
    dq,
    cu_seqlens,
    cu_keys,
    num_sequences,
    scale_log2,
    scale,
    G: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_TAIL: tl.constexpr,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of one tile of queries of one group: the forward's walk with the saved lse."""
    TOKENS: tl.constexpr = TILE_ROWS // R
    H: tl.constexpr = G * R
    i_group = tl.program_id(1)
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    i_sequence, start, length, t_first = find_tile(cu_seqlens, num_sequences, i_tile, TOKENS)
    if t_first >= length:
        return
    t_last = tl.minimum(t_first + TOKENS, length) - 1
    o_row = tl.arange(0, TILE_ROWS)
    o_token = t_first + o_row // R
    m_row = (o_token <= t_last) & (o_row < TOKENS * R)
    o_head = o_row // R * H + o_row % R
    row = (start + t_first).to(tl.int64) * H + i_group * R

    b_q = load_rows(q + row * K, o_head * K, m_row, 0, K_MAIN, K, True)
    b_dout = load_rows(dout + row * V, o_head * V, m_row, 0, V_PADDED, V, True)
    b_lse = log2_sum(lse + row, o_head, m_row)
    b_delta = tl.load(delta + row + o_head, mask=m_row, other=0.0)
    b_dq = tl.zeros([TILE_ROWS, K_MAIN], tl.float32)
    b_q_tail = b_q
    b_dq_tail = b_dq
    if K_TAIL > 0:
        b_q_tail = load_rows(q + row * K, o_head * K, m_row, K_MAIN, K_TAIL, K, True)
        b_dq_tail = tl.zeros([TILE_ROWS, K_TAIL], tl.float32)

    key_start = tl.load(cu_keys + i_sequence)
    key_row = key_start.to(tl.int64) * G + i_group
    p_k = k + key_row * K
    p_v = v + key_row * V
    o_low = visible_low(o_token, WINDOW)
    o_high = visible_high(o_token, BLOCK, STRIDE)
    low = visible_low(t_first, WINDOW)
    high = visible_high(t_last, BLOCK, STRIDE)
    open_low = low
    if WINDOW > 0:
        edge = visible_low(t_last, WINDOW) - low
        open_low = low + (edge + TILE_KEYS - 1) // TILE_KEYS * TILE_KEYS
        b_dq, b_dq_tail = _walk_keys(
            b_dq, b_dq_tail, b_q, b_q_tail, b_dout, b_lse, b_delta, p_k, p_v, k_descriptor,
            v_descriptor, key_start, i_group, low, tl.minimum(open_low, high), high, o_low, o_high,
            scale_log2,
            G, K, K_MAIN, K_TAIL, V, V_PADDED, TILE_KEYS, PRECISION, True,
        )  # fmt: skip
    open_keys = tl.maximum(visible_high(t_first, BLOCK, STRIDE) - open_low, 0)
    open_high = open_low + open_keys // TILE_KEYS * TILE_KEYS
    b_dq, b_dq_tail = _walk_keys(
        b_dq, b_dq_tail, b_q, b_q_tail, b_dout, b_lse, b_delta, p_k, p_v, k_descriptor,
        v_descriptor, key_start, i_group, open_low, open_high, high, o_low, o_high, scale_log2,
        G, K, K_MAIN, K_TAIL, V, V_PADDED, TILE_KEYS, PRECISION, False,
    )  # fmt: skip
    b_dq, b_dq_tail = _walk_keys(
        b_dq, b_dq_tail, b_q, b_q_tail, b_dout, b_lse, b_delta, p_k, p_v, k_descriptor,
        v_descriptor, key_start, i_group, open_high, high, high, o_low, o_high, scale_log2,
        G, K, K_MAIN, K_TAIL, V, V_PADDED, TILE_KEYS, PRECISION, True,
    )  # fmt: skip
    store_rows(dq + row * K, b_dq * scale, o_head * K, m_row, 0, K_MAIN, K)
    if K_TAIL > 0:
        store_rows(dq + row * K, b_dq_tail * scale, o_head * K, m_row, K_MAIN, K_TAIL, K)
