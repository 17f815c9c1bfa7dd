"""Attention over the n selection blocks that a token's group chose, backward.

dq is the forward's walk with the saved lse; dk and dv go by key blocks (selected_dkv). No atomics:
equal inputs give equal bits.
"""

# Jitted functions and their launches have no types that a checker knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.shapes import NsaConfig
from nsa_kernels.triton_backend.selected_dkv import selected_dkv
from nsa_kernels.triton_backend.selected_forward import (
    chosen_keys,
    count_choices,
    selected_tiles,
)
from nsa_kernels.triton_backend.tiles import (
    find_token_sequence,
    key_widths,
    load_rows,
    log2_scale,
    log2_sum,
    row_delta,
    store_rows,
    value_widths,
)


def selected_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    config: NsaConfig,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of selected_forward; the choice of blocks is held fixed."""
    if q.shape[0] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = row_delta(out, dout, lse, dlse)
    dq = selected_dq(dout, q, k, v, lse, delta, block_indices, cu_seqlens, config, scale)
    dk, dv = selected_dkv(dout, q, k, v, lse, delta, block_indices, cu_seqlens, config, scale)
    return dq, dk, dv


def selected_dq(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    config: NsaConfig,
    scale: float,
) -> Tensor:
    """dq [T, H, K]; delta is tiles.row_delta's."""
    num_tokens, num_heads, key_width = q.shape
    _, num_groups, value_width = v.shape
    heads_per_group = num_heads // num_groups
    block = config.selection_block_size
    tiles = selected_tiles(q.dtype, key_width, value_width, heads_per_group, block)
    num_choices = block_indices.shape[-1]
    dq = torch.empty_like(q)
    selected_backward_dq_kernel[(num_tokens, num_groups)](
        q,
        k,
        v,
        block_indices,
        dout,
        lse,
        delta,
        dq,
        cu_seqlens,
        cu_seqlens.numel() - 1,
        log2_scale(scale),
        scale,
        G=num_groups,
        R=heads_per_group,
        N=num_choices,
        N_PADDED=triton.next_power_of_2(num_choices),
        SELECTION_BLOCK=block,
        **key_widths(key_width),
        **value_widths(value_width),
        PRECISION=tiles.precision,
        TILE_ROWS=tiles.rows,
        TILE_KEYS=tiles.keys,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return dq


@triton.jit(do_not_specialize=["num_sequences"])
def selected_backward_dq_kernel(
    q,
    k,
    v,
    block_indices,
    dout,
    lse,
    delta,
    dq,
    cu_seqlens,
    num_sequences,
    scale_log2,
    scale,
    G: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    N_PADDED: tl.constexpr,
    SELECTION_BLOCK: tl.constexpr,
    K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_TAIL: tl.constexpr,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of the heads of one group at one token."""
    i_token = tl.program_id(0)
    i_group = tl.program_id(1)
    i_sequence = find_token_sequence(cu_seqlens, num_sequences, i_token)
    start = tl.load(cu_seqlens + i_sequence)
    position = i_token - start
    o_row = tl.arange(0, TILE_ROWS)
    m_row = o_row < R
    row = (i_token.to(tl.int64) * G + i_group) * R
    p_choice = block_indices + (i_token.to(tl.int64) * G + i_group) * N

    b_q = load_rows(q + row * K, o_row * K, m_row, 0, K_MAIN, K, True)
    b_dout = load_rows(dout + row * V, o_row * V, m_row, 0, V_PADDED, V, True)
    b_lse = log2_sum(lse + row, o_row, m_row)
    b_delta = tl.load(delta + row + o_row, mask=m_row, other=0.0)
    b_dq = tl.zeros([TILE_ROWS, K_MAIN], tl.float32)
    b_q_tail = b_q
    b_dq_tail = b_dq
    if K_TAIL > 0:
        b_q_tail = load_rows(q + row * K, o_row * K, m_row, K_MAIN, K_TAIL, K, True)
        b_dq_tail = tl.zeros([TILE_ROWS, K_TAIL], tl.float32)

    o_tile = tl.arange(0, TILE_KEYS)
    TILES: tl.constexpr = (SELECTION_BLOCK + TILE_KEYS - 1) // TILE_KEYS
    for i_tile in range(0, count_choices(p_choice, N, N_PADDED) * TILES):
        first, m_key = chosen_keys(p_choice, i_tile, position, SELECTION_BLOCK, TILE_KEYS)
        key_row = (start + first).to(tl.int64) * G + i_group
        p_k = k + key_row * K
        b_k = load_rows(p_k, o_tile * (G * K), m_key, 0, K_MAIN, K, True)
        b_logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if K_TAIL > 0:
            b_k_tail = load_rows(p_k, o_tile * (G * K), m_key, K_MAIN, K_TAIL, K, True)
            b_logits = tl.dot(b_q_tail, tl.trans(b_k_tail), b_logits, input_precision=PRECISION)
        b_logits = tl.where(m_key[None, :], b_logits, float("-inf"))
        b_p = tl.exp2(b_logits * scale_log2 - b_lse[:, None])
        b_v = load_rows(v + key_row * V, o_tile * (G * V), m_key, 0, V_PADDED, V, True)
        b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION)
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)
        if K_TAIL > 0:
            b_dq_tail = tl.dot(b_ds, b_k_tail, b_dq_tail, input_precision=PRECISION)

    store_rows(dq + row * K, b_dq * scale, o_row * K, m_row, 0, K_MAIN, K)
    if K_TAIL > 0:
        store_rows(dq + row * K, b_dq_tail * scale, o_row * K, m_row, K_MAIN, K_TAIL, K)
