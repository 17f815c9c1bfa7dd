"""Attention over one contiguous span of keys per query: compressed, sliding and full, backward.

Two passes, no atomics, so that equal inputs give equal bits. dq walks keys exactly as the forward
does. dk and dv belong to a key tile and walk the queries that see it, all heads of the group, from
the last to the first: programs of different key tiles then read the same queries at the same time
and share them in L2. Where key tiles are few and walks are long (compressed keys), the query tiles
of a walk are dealt to several programs, whose fp32 parts are summed in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.packing import num_tiles
from nsa_kernels.shapes import NsaConfig
from nsa_kernels.triton_backend.span_forward import (
    Span,
    compressed_span,
    full_span,
    sliding_span,
)
from nsa_kernels.triton_backend.tiles import (
    Tiles,
    find_tile,
    key_widths,
    load_rows,
    log2_scale,
    log2_sum,
    row_delta,
    store_rows,
    value_widths,
    visible_high,
    visible_low,
)

# Enough programs to fill any GPU several times over, of unequal walks and of equal ones (windows);
# constants, so that results do not depend on the device. More parts would cost more memory than
# they save time.
_WANTED_PROGRAMS = 1024
_WANTED_WINDOW_PROGRAMS = 256
_MAX_PARTS = 16

Gradients = tuple[Tensor, Tensor, Tensor]


def compressed_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    config: NsaConfig,
    scale: float,
) -> Gradients:
    """dq, dk, dv of compressed_forward; rows of k and v past the last block get zero."""
    span = compressed_span(cu_seqlens, config)
    return span_backward(dout, dlse, q, k, v, out, lse, cu_seqlens, span, scale)


def sliding_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    config: NsaConfig,
    scale: float,
) -> Gradients:
    """dq, dk, dv of sliding_forward."""
    span = sliding_span(cu_seqlens, config)
    return span_backward(dout, dlse, q, k, v, out, lse, cu_seqlens, span, scale)


def full_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
) -> Gradients:
    """dq, dk, dv of full_forward."""
    return span_backward(dout, dlse, q, k, v, out, lse, cu_seqlens, full_span(cu_seqlens), scale)


def span_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    span: Span,
    scale: float,
) -> Gradients:
    """Launch the two passes. dlse is the gradient of the natural lse."""
    if q.shape[0] == 0 or k.shape[0] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = row_delta(out, dout, lse, dlse)
    dq = _launch_dq(dout, q, k, v, lse, delta, cu_seqlens, span, scale)
    dk, dv = _launch_dkv(dout, q, k, v, lse, delta, cu_seqlens, span, scale)
    return dq, dk, dv


def _launch_dq(
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
    num_tokens, num_heads, key_width = q.shape
    _, num_groups, value_width = v.shape
    heads_per_group = num_heads // num_groups
    tiles = dq_tiles(q.dtype, key_width, value_width, heads_per_group)
    num_sequences = cu_seqlens.numel() - 1
    dq = torch.empty_like(q)
    grid = (num_tiles(num_tokens, num_sequences, tiles.rows // heads_per_group), num_groups)
    span_backward_dq_kernel[grid](
        q, k, v, dout, lse, delta, dq, cu_seqlens, span.cu_keys, num_sequences,
        log2_scale(scale), scale,
        G=num_groups,
        R=heads_per_group,
        **key_widths(key_width),
        **value_widths(value_width),
        **span.constants,
        TILE_ROWS=tiles.rows,
        TILE_KEYS=tiles.keys,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
    return dq


def _launch_dkv(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    cu_seqlens: Tensor,
    span: Span,
    scale: float,
) -> tuple[Tensor, Tensor]:
    num_keys, num_groups, key_width = k.shape
    value_width = v.shape[-1]
    heads_per_group = q.shape[1] // num_groups
    tiles = dkv_tiles(q.dtype, key_width, value_width, heads_per_group)
    num_sequences = cu_seqlens.numel() - 1
    num_key_tiles = num_tiles(num_keys, num_sequences, tiles.keys)
    wanted = _WANTED_WINDOW_PROGRAMS if span.window else _WANTED_PROGRAMS
    parts = min(triton.cdiv(wanted, num_key_tiles * num_groups), _MAX_PARTS)
    # Spare keys belong to no sequence: no program writes their gradient.
    make = torch.zeros if span.has_spare_keys else torch.empty
    dtype = q.dtype if parts == 1 else torch.float32
    dk = make(parts, *k.shape, dtype=dtype, device=k.device)
    dv = make(parts, *v.shape, dtype=dtype, device=v.device)
    span_backward_dkv_kernel[(num_key_tiles, parts, num_groups)](
        q, k, v, dout, lse, delta, dk, dv, cu_seqlens, span.cu_keys, num_sequences, num_keys,
        log2_scale(scale), scale,
        G=num_groups,
        R=heads_per_group,
        PARTS=parts,
        **key_widths(key_width),
        **value_widths(value_width),
        **span.constants,
        TILE_ROWS=tiles.rows,
        TILE_KEYS=tiles.keys,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
    if parts == 1:
        return dk[0], dv[0]
    return dk.sum(0).to(q.dtype), dv.sum(0).to(q.dtype)


def dq_tiles(dtype: torch.dtype, key_width: int, value_width: int, heads_per_group: int) -> Tiles:
    """Tile sizes of the dq pass: q, dout and dq stay, keys and values stream."""
    width = max(key_width, value_width)
    if dtype == torch.float32:
        return Tiles(max(32, triton.next_power_of_2(heads_per_group)), 32, 4, 1)
    if width <= 64:
        return Tiles(128, 64, 4, 3)
    if width <= 192:
        return Tiles(128, 64, 8, 2)
    return Tiles(64, 64, 8, 2)


def dkv_tiles(dtype: torch.dtype, key_width: int, value_width: int, heads_per_group: int) -> Tiles:
    """Tile sizes of the dk, dv pass: k, v, dk and dv stay, queries and dout stream."""
    width = max(key_width, value_width)
    least_rows = triton.next_power_of_2(heads_per_group)
    if dtype == torch.float32:
        return Tiles(max(32, least_rows), 32, 4, 1)
    if width <= 64:
        return Tiles(64, 128, 8, 3)
    if width <= 128:
        return Tiles(64, 128, 8, 2)
    if width <= 192:
        return Tiles(64, 64, 8, 2)
    return Tiles(max(32, least_rows), 64, 8, 2)


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
    MASKED: tl.constexpr,
):
    """Add the key tiles of [first, end) to dq / scale."""
    o_tile = tl.arange(0, TILE_KEYS)
    k_stride = tl.full([], G * K, tl.int64)
    v_stride = tl.full([], G * V, tl.int64)
    for i_key in range(first, end, TILE_KEYS):
        o_key = i_key + o_tile
        m_key = o_key < key_end
        b_k = load_rows(p_k + i_key * k_stride, o_tile * (G * K), m_key, 0, K_MAIN, K, MASKED)
        b_logits = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if K_TAIL > 0:
            b_k_tail = load_rows(
                p_k + i_key * k_stride, o_tile * (G * K), m_key, K_MAIN, K_TAIL, K, MASKED
            )
            b_logits = tl.dot(b_q_tail, tl.trans(b_k_tail), b_logits, input_precision="ieee")
        if MASKED:
            m_seen = (o_key[None, :] >= o_low[:, None]) & (o_key[None, :] < o_high[:, None])
            b_logits = tl.where(m_seen, b_logits, float("-inf"))
        b_p = tl.exp2(b_logits * scale_log2 - b_lse[:, None])
        b_v = load_rows(p_v + i_key * v_stride, o_tile * (G * V), m_key, 0, V_PADDED, V, MASKED)
        b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision="ieee")
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision="ieee")
        if K_TAIL > 0:
            b_dq_tail = tl.dot(b_ds, b_k_tail, b_dq_tail, input_precision="ieee")
    return b_dq, b_dq_tail


@triton.jit(do_not_specialize=["num_sequences"])
def span_backward_dq_kernel(
    q,
    k,
    v,
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

    key_row = tl.load(cu_keys + i_sequence).to(tl.int64) * G + i_group
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
            b_dq, b_dq_tail, b_q, b_q_tail, b_dout, b_lse, b_delta, p_k, p_v,
            low, tl.minimum(open_low, high), high, o_low, o_high, scale_log2,
            G, K, K_MAIN, K_TAIL, V, V_PADDED, TILE_KEYS, True,
        )  # fmt: skip
    open_keys = tl.maximum(visible_high(t_first, BLOCK, STRIDE) - open_low, 0)
    open_high = open_low + open_keys // TILE_KEYS * TILE_KEYS
    b_dq, b_dq_tail = _walk_keys(
        b_dq, b_dq_tail, b_q, b_q_tail, b_dout, b_lse, b_delta, p_k, p_v,
        open_low, open_high, high, o_low, o_high, scale_log2,
        G, K, K_MAIN, K_TAIL, V, V_PADDED, TILE_KEYS, False,
    )  # fmt: skip
    b_dq, b_dq_tail = _walk_keys(
        b_dq, b_dq_tail, b_q, b_q_tail, b_dout, b_lse, b_delta, p_k, p_v,
        open_high, high, high, o_low, o_high, scale_log2,
        G, K, K_MAIN, K_TAIL, V, V_PADDED, TILE_KEYS, True,
    )  # fmt: skip
    store_rows(dq + row * K, b_dq * scale, o_head * K, m_row, 0, K_MAIN, K)
    if K_TAIL > 0:
        store_rows(dq + row * K, b_dq_tail * scale, o_head * K, m_row, K_MAIN, K_TAIL, K)


@triton.jit
def _walk_queries(
    b_dk,
    b_dk_tail,
    b_dv,
    b_k,
    b_k_tail,
    b_v,
    p_q,
    p_dout,
    p_lse,
    p_delta,
    first,
    end,
    i_part,
    length,
    o_begin,
    o_key,
    scale_log2,
    G: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_TAIL: tl.constexpr,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the query tiles of [first, end) dealt to i_part, last first, to dk / scale and dv.

    All tiles are transposed, [keys, rows], so that p and ds feed their dots as left operands.
    """
    TOKENS: tl.constexpr = TILE_ROWS // R
    IS_RAGGED: tl.constexpr = MASKED or TILE_ROWS % R != 0
    H: tl.constexpr = G * R
    o_row = tl.arange(0, TILE_ROWS)
    o_head = o_row // R * H + o_row % R
    q_stride = tl.full([], TOKENS * H, tl.int64)
    last = end - 1 - (end - 1 + PARTS - i_part) % PARTS
    count = tl.maximum(last - first + PARTS, 0) // PARTS
    for i_step in range(0, count):
        i_tile = last - i_step * PARTS
        o_token = i_tile * TOKENS + o_row // R
        m_row = (o_token < length) & (o_row < TOKENS * R)
        row = i_tile * q_stride
        b_q = load_rows(p_q + row * K, o_head * K, m_row, 0, K_MAIN, K, IS_RAGGED)
        b_logits = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        if K_TAIL > 0:
            b_q_tail = load_rows(p_q + row * K, o_head * K, m_row, K_MAIN, K_TAIL, K, IS_RAGGED)
            b_logits = tl.dot(b_k_tail, tl.trans(b_q_tail), b_logits, input_precision="ieee")
        if MASKED:
            m_seen = o_token[None, :] >= o_begin[:, None]
            if WINDOW > 0:
                m_seen = m_seen & (o_token[None, :] < o_key[:, None] + WINDOW)
            b_logits = tl.where(m_seen, b_logits, float("-inf"))
        b_lse = log2_sum(p_lse + row, o_head, m_row)
        b_delta = tl.load(p_delta + row + o_head, mask=m_row, other=0.0)
        b_p = tl.exp2(b_logits * scale_log2 - b_lse[None, :])
        b_dout = load_rows(p_dout + row * V, o_head * V, m_row, 0, V_PADDED, V, IS_RAGGED)
        b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv, input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision="ieee")
        if K_TAIL > 0:
            b_dk_tail = tl.dot(b_ds, b_q_tail, b_dk_tail, input_precision="ieee")
    return b_dk, b_dk_tail, b_dv


@triton.jit(do_not_specialize=["num_sequences", "num_keys"])
def span_backward_dkv_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dk,
    dv,
    cu_seqlens,
    cu_keys,
    num_sequences,
    num_keys,
    scale_log2,
    scale,
    G: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,
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
):
    """dk and dv [PARTS, S, G, K/V] of one key tile of one group, from every PARTS-th query tile."""
    TOKENS: tl.constexpr = TILE_ROWS // R
    H: tl.constexpr = G * R
    i_part = tl.program_id(1)
    i_group = tl.program_id(2)
    i_sequence, key_start, key_length, first_key = find_tile(
        cu_keys, num_sequences, tl.program_id(0), TILE_KEYS
    )
    if first_key >= key_length:
        return
    o_tile = tl.arange(0, TILE_KEYS)
    o_key = first_key + o_tile
    m_key = o_key < key_length
    key_row = (key_start + first_key).to(tl.int64) * G + i_group
    b_k = load_rows(k + key_row * K, o_tile * (G * K), m_key, 0, K_MAIN, K, True)
    b_v = load_rows(v + key_row * V, o_tile * (G * V), m_key, 0, V_PADDED, V, True)
    b_dk = tl.zeros([TILE_KEYS, K_MAIN], tl.float32)
    b_dv = tl.zeros([TILE_KEYS, V_PADDED], tl.float32)
    b_k_tail = b_k
    b_dk_tail = b_dk
    if K_TAIL > 0:
        b_k_tail = load_rows(k + key_row * K, o_tile * (G * K), m_key, K_MAIN, K_TAIL, K, True)
        b_dk_tail = tl.zeros([TILE_KEYS, K_TAIL], tl.float32)

    start = tl.load(cu_seqlens + i_sequence)
    length = tl.load(cu_seqlens + i_sequence + 1) - start
    row = start.to(tl.int64) * H + i_group * R
    # Query tiles [low, high) see the key tile; all of [open_low, open_high) see all of it.
    last_key = tl.minimum(first_key + TILE_KEYS, key_length) - 1
    o_begin = o_key * STRIDE + (BLOCK - 1)
    begin = first_key * STRIDE + (BLOCK - 1)
    open_begin = last_key * STRIDE + (BLOCK - 1)
    end = length
    open_end = length
    if WINDOW > 0:
        end = tl.minimum(length, last_key + WINDOW)
        open_end = tl.minimum(length, first_key + WINDOW)
    low = begin // TOKENS
    high = (end + TOKENS - 1) // TOKENS
    open_low = tl.minimum((open_begin + TOKENS - 1) // TOKENS, high)
    open_high = tl.maximum(open_end // TOKENS, open_low)
    b_dk, b_dk_tail, b_dv = _walk_queries(
        b_dk, b_dk_tail, b_dv, b_k, b_k_tail, b_v, q + row * K, dout + row * V, lse + row,
        delta + row, open_high, high, i_part, length, o_begin, o_key, scale_log2,
        G, R, PARTS, K, K_MAIN, K_TAIL, V, V_PADDED, WINDOW, TILE_ROWS, True,
    )  # fmt: skip
    b_dk, b_dk_tail, b_dv = _walk_queries(
        b_dk, b_dk_tail, b_dv, b_k, b_k_tail, b_v, q + row * K, dout + row * V, lse + row,
        delta + row, open_low, open_high, i_part, length, o_begin, o_key, scale_log2,
        G, R, PARTS, K, K_MAIN, K_TAIL, V, V_PADDED, WINDOW, TILE_ROWS, False,
    )  # fmt: skip
    b_dk, b_dk_tail, b_dv = _walk_queries(
        b_dk, b_dk_tail, b_dv, b_k, b_k_tail, b_v, q + row * K, dout + row * V, lse + row,
        delta + row, low, open_low, i_part, length, o_begin, o_key, scale_log2,
        G, R, PARTS, K, K_MAIN, K_TAIL, V, V_PADDED, WINDOW, TILE_ROWS, True,
    )  # fmt: skip

    part_row = (i_part.to(tl.int64) * num_keys) * G + key_row
    store_rows(dk + part_row * K, b_dk * scale, o_tile * (G * K), m_key, 0, K_MAIN, K)
    store_rows(dv + part_row * V, b_dv, o_tile * (G * V), m_key, 0, V_PADDED, V)
    if K_TAIL > 0:
        store_rows(dk + part_row * K, b_dk_tail * scale, o_tile * (G * K), m_key, K_MAIN, K_TAIL, K)
