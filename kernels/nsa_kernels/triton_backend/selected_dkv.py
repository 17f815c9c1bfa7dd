"""Gradient of the keys and values of selected attention, each selection block by its own program.

A program walks a chunk of the list of tokens that chose its block, several tokens with all heads of
the group at a time. A list of one chunk is written at once; longer ones leave fp32 partial sums
that a second kernel adds in the order of the list.
"""

# Jitted functions and their launches have no types that a checker knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.shapes import NsaConfig
from nsa_kernels.triton_backend.selected_forward import block_tile_keys
from nsa_kernels.triton_backend.selected_inverse import InverseChoice, invert_choice
from nsa_kernels.triton_backend.tiles import (
    Tiles,
    find_tile,
    fp32_tiles,
    key_widths,
    load_rows,
    log2_scale,
    log2_sum,
    store_rows,
    value_widths,
)

# Rows (tokens times heads) of a chunk: twice the average list at n * l' = 1024, so that most lists
# are one chunk, yet a small share of the work of one multiprocessor.
_CHUNK_ROWS = 32768


def selected_dkv(
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
    *,
    chunk_rows: int = _CHUNK_ROWS,
) -> tuple[Tensor, Tensor]:
    """dk and dv, shaped like k and v; delta is tiles.row_delta's."""
    _, num_groups, key_width = k.shape
    value_width = v.shape[-1]
    heads_per_group = q.shape[1] // num_groups
    block = config.selection_block_size
    chunk_tokens = chunk_rows // heads_per_group
    inverse = invert_choice(block_indices, cu_seqlens, block, chunk_tokens)
    tiles = selected_dkv_tiles(q.dtype, key_width, value_width, heads_per_group, block)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    parts_k = _make_parts(inverse, block, k)
    parts_v = _make_parts(inverse, block, v)
    sizes = {
        "G": num_groups,
        "SELECTION_BLOCK": block,
        **key_widths(key_width),
        **value_widths(value_width),
        "TILE_KEYS": tiles.keys,
    }
    num_sequences = cu_seqlens.numel() - 1
    tiles_per_block = triton.cdiv(block, tiles.keys)
    selected_backward_dkv_kernel[(inverse.chunk_lists.numel(), tiles_per_block)](
        q, k, v, dout, lse, delta, dk, dv, parts_k, parts_v,
        inverse.tokens, inverse.list_starts, inverse.chunk_lists, inverse.chunk_starts,
        inverse.slots, cu_seqlens, num_sequences, inverse.num_blocks, chunk_tokens,
        log2_scale(scale), scale,
        R=heads_per_group,
        **sizes,
        PRECISION=tiles.precision,
        TILE_ROWS=tiles.rows,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
    selected_backward_sum_kernel[(num_groups * inverse.num_blocks, tiles_per_block)](
        dk, dv, parts_k, parts_v, inverse.chunk_starts, inverse.slots,
        cu_seqlens, num_sequences, inverse.num_blocks, scale, **sizes,
    )  # fmt: skip
    return dk, dv


def _make_parts(inverse: InverseChoice, block: int, like: Tensor) -> Tensor:
    shape = (inverse.max_slots, block, like.shape[-1])
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def selected_dkv_tiles(
    dtype: torch.dtype, key_width: int, value_width: int, heads_per_group: int, block: int
) -> Tiles:
    """Tile sizes of the dk, dv pass: k, v, dk and dv stay, the rows of several tokens stream."""
    width = max(key_width, value_width)
    keys = block_tile_keys(block)
    least_rows = triton.next_power_of_2(heads_per_group)
    if dtype == torch.float32:
        tiles = fp32_tiles(key_width, value_width, max(32, heads_per_group))
        return replace(tiles, keys=min(keys, tiles.keys))
    if width <= 128:
        return Tiles(64, keys, 4, 2)
    if width <= 192:
        return Tiles(64, keys, 8, 2)
    return Tiles(max(32, least_rows), keys, 8, 2)


@triton.jit
def find_block(
    cu_seqlens, num_sequences, i_block, SELECTION_BLOCK: tl.constexpr, TILE_KEYS: tl.constexpr
):
    """(sequence's first token, first key of the block's tile program_id(1), end of the block).

    Keys count within their sequence. The tile is empty if its first key is not below the end.
    """
    _, start, length, first = find_tile(cu_seqlens, num_sequences, i_block, SELECTION_BLOCK)
    end = tl.minimum(length, first + SELECTION_BLOCK)
    first += tl.program_id(1) * TILE_KEYS
    return start, first, end


@triton.jit(do_not_specialize=["num_sequences", "num_blocks"])
def selected_backward_dkv_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dk,
    dv,
    parts_k,
    parts_v,
    tokens,
    list_starts,
    chunk_lists,
    chunk_starts,
    slots,
    cu_seqlens,
    num_sequences,
    num_blocks,
    chunk_tokens,
    scale_log2,
    scale,
    G: tl.constexpr,
    R: tl.constexpr,
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
    """dk and dv of one key tile from one chunk of the tokens that chose its block."""
    TOKENS: tl.constexpr = TILE_ROWS // R
    H: tl.constexpr = G * R
    i_chunk = tl.program_id(0)
    i_list = tl.load(chunk_lists + i_chunk)
    i_group = i_list // num_blocks
    if i_group >= G:
        return
    start, first_key, key_end = find_block(
        cu_seqlens, num_sequences, i_list % num_blocks, SELECTION_BLOCK, TILE_KEYS
    )
    if first_key >= key_end:
        return
    chunk = i_chunk - tl.load(chunk_starts + i_list)
    begin = tl.load(list_starts + i_list) + chunk.to(tl.int64) * chunk_tokens
    count = tl.minimum(tl.load(list_starts + i_list + 1) - begin, chunk_tokens).to(tl.int32)

    o_tile = tl.arange(0, TILE_KEYS)
    o_key = first_key + o_tile
    m_key = o_key < key_end
    key_row = (start + first_key).to(tl.int64) * G + i_group
    b_k = load_rows(k + key_row * K, o_tile * (G * K), m_key, 0, K_MAIN, K, True)
    b_v = load_rows(v + key_row * V, o_tile * (G * V), m_key, 0, V_PADDED, V, True)
    b_dk = tl.zeros([TILE_KEYS, K_MAIN], tl.float32)
    b_dv = tl.zeros([TILE_KEYS, V_PADDED], tl.float32)
    b_k_tail = b_k
    b_dk_tail = b_dk
    if K_TAIL > 0:
        b_k_tail = load_rows(k + key_row * K, o_tile * (G * K), m_key, K_MAIN, K_TAIL, K, True)
        b_dk_tail = tl.zeros([TILE_KEYS, K_TAIL], tl.float32)

    o_row = tl.arange(0, TILE_ROWS)
    for i_entry in range(0, count, TOKENS):
        o_entry = i_entry + o_row // R
        m_row = (o_entry < count) & (o_row < TOKENS * R)
        b_token = tl.load(tokens + begin + o_entry, mask=m_row, other=0)
        o_head = b_token.to(tl.int64) * H + (i_group * R + o_row % R)
        b_q = load_rows(q, o_head * K, m_row, 0, K_MAIN, K, True)
        b_logits = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        if K_TAIL > 0:
            b_q_tail = load_rows(q, o_head * K, m_row, K_MAIN, K_TAIL, K, True)
            b_logits = tl.dot(b_k_tail, tl.trans(b_q_tail), b_logits, input_precision=PRECISION)
        m_seen = (b_token - start)[None, :] >= o_key[:, None]
        b_logits = tl.where(m_seen, b_logits, float("-inf"))
        b_lse = log2_sum(lse, o_head, m_row)
        b_delta = tl.load(delta + o_head, mask=m_row, other=0.0)
        b_p = tl.exp2(b_logits * scale_log2 - b_lse[None, :])
        b_dout = load_rows(dout, o_head * V, m_row, 0, V_PADDED, V, True)
        b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision=PRECISION)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
        if K_TAIL > 0:
            b_dk_tail = tl.dot(b_ds, b_q_tail, b_dk_tail, input_precision=PRECISION)

    slot = tl.load(slots + i_list)
    if slot < 0:
        store_rows(dk + key_row * K, b_dk * scale, o_tile * (G * K), m_key, 0, K_MAIN, K)
        store_rows(dv + key_row * V, b_dv, o_tile * (G * V), m_key, 0, V_PADDED, V)
        if K_TAIL > 0:
            p_dk = dk + key_row * K
            store_rows(p_dk, b_dk_tail * scale, o_tile * (G * K), m_key, K_MAIN, K_TAIL, K)
    else:
        part = (slot + chunk).to(tl.int64) * SELECTION_BLOCK + tl.program_id(1) * TILE_KEYS
        store_rows(parts_k + part * K, b_dk, o_tile * K, m_key, 0, K_MAIN, K)
        store_rows(parts_v + part * V, b_dv, o_tile * V, m_key, 0, V_PADDED, V)
        if K_TAIL > 0:
            store_rows(parts_k + part * K, b_dk_tail, o_tile * K, m_key, K_MAIN, K_TAIL, K)


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
    dk,
    dv,
    parts_k,
    parts_v,
    chunk_starts,
    slots,
    cu_seqlens,
    num_sequences,
    num_blocks,
    scale,
    G: tl.constexpr,
    SELECTION_BLOCK: tl.constexpr,
    K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_TAIL: tl.constexpr,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
    TILE_KEYS: tl.constexpr,
):
    """dk and dv of one key tile whose list has several chunks."""
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
    b_dk = _sum_parts(parts_k, slot, count, o_tile, m_key, 0, K_MAIN, K, SELECTION_BLOCK, TILE_KEYS)
    store_rows(dk + key_row * K, b_dk * scale, o_tile * (G * K), m_key, 0, K_MAIN, K)
    b_dv = _sum_parts(
        parts_v, slot, count, o_tile, m_key, 0, V_PADDED, V, SELECTION_BLOCK, TILE_KEYS
    )
    store_rows(dv + key_row * V, b_dv, o_tile * (G * V), m_key, 0, V_PADDED, V)
    if K_TAIL > 0:
        b_tail = _sum_parts(
            parts_k, slot, count, o_tile, m_key, K_MAIN, K_TAIL, K, SELECTION_BLOCK, TILE_KEYS
        )
        store_rows(dk + key_row * K, b_tail * scale, o_tile * (G * K), m_key, K_MAIN, K_TAIL, K)
