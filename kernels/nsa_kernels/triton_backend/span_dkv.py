"""Gradient of the keys and values of span attention, each key tile by its own program.

A program walks the queries that see its key tile, all heads of the group, from the last to the
first: programs of different key tiles then read the same queries at the same time and share them in
L2. Where key tiles are few and walks are long (compressed keys), the query tiles of a walk are
dealt to several programs, whose fp32 parts are summed in a fixed order.
"""

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
    find_tile,
    fp32_tiles,
    group_descriptors,
    key_widths,
    load_rows,
    log2_scale,
    log2_sum,
    store_rows,
    value_widths,
)

# Enough programs to fill any GPU several times over, of unequal walks and of equal ones (windows);
# constants, so that results do not depend on the device. More parts would cost more memory than
# they save time.
_WANTED_PROGRAMS = 1024
_WANTED_WINDOW_PROGRAMS = 256
_MAX_PARTS = 16


def span_dkv(
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
    """dk and dv, shaped like k and v; the arguments are span_backward.span_gradients'."""
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
    dtype, shape = (q.dtype, ()) if parts == 1 else (torch.float32, (parts,))
    dk = make(*shape, *k.shape, dtype=dtype, device=k.device)
    dv = make(*shape, *v.shape, dtype=dtype, device=v.device)
    q_descriptor, dout_descriptor = group_descriptors(
        tiles.rows // heads_per_group, heads_per_group, q, dout
    )
    span_backward_dkv_kernel[(num_key_tiles, parts, num_groups)](
        q, k, v, dout, q_descriptor, dout_descriptor, lse, delta, dk, dv, cu_seqlens,
        span.cu_keys, num_sequences, num_keys, log2_scale(scale), scale,
        G=num_groups,
        R=heads_per_group,
        PARTS=parts,
        **key_widths(key_width),
        **value_widths(value_width),
        **span.constants,
        PRECISION=tiles.precision,
        TILE_ROWS=tiles.rows,
        TILE_KEYS=tiles.keys,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
    if parts == 1:
        return dk, dv
    return dk.sum(0).to(q.dtype), dv.sum(0).to(q.dtype)


def dkv_tiles(dtype: torch.dtype, key_width: int, value_width: int, heads_per_group: int) -> Tiles:
    """Tile sizes of the dk, dv pass: k, v, dk and dv stay, queries and dout stream."""
    width = max(key_width, value_width)
    least_rows = triton.next_power_of_2(heads_per_group)
    if dtype == torch.float32:
        return fp32_tiles(key_width, value_width, max(32, heads_per_group))
    if width <= 64:
        return Tiles(64, 128, 8, 3)
    if width <= 128:
        return Tiles(64, 128, 8, 2)
    if width <= 192:
        return Tiles(64, 64, 8, 2)
    return Tiles(max(32, least_rows), 64, 8, 2)


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
    q_descriptor,
    dout_descriptor,
    start,
    i_group,
    first,
    end,
    gap,
    gap_size,
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
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the query tiles of [first, end) dealt to i_part, last first, to dk / scale and dv.

    If MASKED, tiles from gap on are gap_size further on: what lies between is left out.
    All tiles are transposed, [keys, rows], so that p and ds feed their dots as left operands.
    Descriptors are None or used where not MASKED.
    """
    HAS_DESCRIPTORS: tl.constexpr = not MASKED and q_descriptor is not None
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
        if MASKED:
            i_tile += tl.where(i_tile >= gap, gap_size, 0)
        o_token = i_tile * TOKENS + o_row // R
        m_row = (o_token < length) & (o_row < TOKENS * R)
        row = i_tile * q_stride
        if HAS_DESCRIPTORS:
            b_q = q_descriptor.load([start + i_tile * TOKENS, i_group * R, 0])
            b_q = tl.reshape(b_q, [TILE_ROWS, K])
        else:
            b_q = load_rows(p_q + row * K, o_head * K, m_row, 0, K_MAIN, K, IS_RAGGED)
        b_logits = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        if K_TAIL > 0:
            b_q_tail = load_rows(p_q + row * K, o_head * K, m_row, K_MAIN, K_TAIL, K, IS_RAGGED)
            b_logits = tl.dot(b_k_tail, tl.trans(b_q_tail), b_logits, input_precision=PRECISION)
        if MASKED:
            m_seen = o_token[None, :] >= o_begin[:, None]
            if WINDOW > 0:
                m_seen = m_seen & (o_token[None, :] < o_key[:, None] + WINDOW)
            b_logits = tl.where(m_seen, b_logits, float("-inf"))
        b_lse = log2_sum(p_lse + row, o_head, m_row)
        b_delta = tl.load(p_delta + row + o_head, mask=m_row, other=0.0)
        b_p = tl.exp2(b_logits * scale_log2 - b_lse[None, :])
        if HAS_DESCRIPTORS:
            b_dout = dout_descriptor.load([start + i_tile * TOKENS, i_group * R, 0])
            b_dout = tl.reshape(b_dout, [TILE_ROWS, V])
        else:
            b_dout = load_rows(p_dout + row * V, o_head * V, m_row, 0, V_PADDED, V, IS_RAGGED)
        b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision=PRECISION)
        b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv, input_precision=PRECISION)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
        if K_TAIL > 0:
            b_dk_tail = tl.dot(b_ds, b_q_tail, b_dk_tail, input_precision=PRECISION)
    return b_dk, b_dk_tail, b_dv


@triton.jit(do_not_specialize=["num_sequences", "num_keys"])
def span_backward_dkv_kernel(
    q,
    k,
    v,
    dout,
    q_descriptor,
    dout_descriptor,
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
    PRECISION: tl.constexpr,
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
    open_tiles = open_high - open_low
    # The open tiles first: the other way round ptxas waits for each of their products by itself.
    b_dk, b_dk_tail, b_dv = _walk_queries(
        b_dk, b_dk_tail, b_dv, b_k, b_k_tail, b_v, q + row * K, dout + row * V, lse + row,
        delta + row, q_descriptor, dout_descriptor, start, i_group, open_low, open_high, 0, 0,
        i_part, length, o_begin, o_key, scale_log2,
        G, R, PARTS, K, K_MAIN, K_TAIL, V, V_PADDED, WINDOW, TILE_ROWS, PRECISION, False,
    )  # fmt: skip
    b_dk, b_dk_tail, b_dv = _walk_queries(
        b_dk, b_dk_tail, b_dv, b_k, b_k_tail, b_v, q + row * K, dout + row * V, lse + row,
        delta + row, q_descriptor, dout_descriptor, start, i_group, low, high - open_tiles,
        open_low, open_tiles, i_part, length, o_begin, o_key, scale_log2,
        G, R, PARTS, K, K_MAIN, K_TAIL, V, V_PADDED, WINDOW, TILE_ROWS, PRECISION, True,
    )  # fmt: skip

    part_row = (i_part.to(tl.int64) * num_keys) * G + key_row
    store_rows(dk + part_row * K, b_dk * scale, o_tile * (G * K), m_key, 0, K_MAIN, K)
    store_rows(dv + part_row * V, b_dv, o_tile * (G * V), m_key, 0, V_PADDED, V)
    if K_TAIL > 0:
        store_rows(dk + part_row * K, b_dk_tail * scale, o_tile * (G * K), m_key, K_MAIN, K_TAIL, K)
