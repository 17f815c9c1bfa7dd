"""Attention over the n selection blocks of a token's group, backward, in one pass by key blocks.

A program loads one selection block and walks a chunk of the list of choices that name it, so that
scores and their gradients are computed once for dq, dk and dv. Its share of dq is left as a part of
each choice, which a second kernel adds per token. dk and dv of a block grow in fp32 from range to
range; a list of several chunks leaves partial sums that are added in the order of the list. No
atomics: equal inputs give equal bits.
"""

# Jitted functions and their launches have no types that a checker knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.shapes import NsaConfig
from nsa_kernels.triton_backend.selected_by_block import (
    CHUNK_TOKENS,
    block_tile_keys,
    count_masked,
    find_block,
    find_chunk,
    is_long,
    load_tokens,
    range_span,
)
from nsa_kernels.triton_backend.selected_key_sums import (
    KeySums,
    grow_rows,
    selected_backward_sum_kernel,
)
from nsa_kernels.triton_backend.selected_lists import ChoiceLists, list_choices
from nsa_kernels.triton_backend.selected_merge import QueryParts, merge_sum
from nsa_kernels.triton_backend.tiles import (
    Tiles,
    fp32_tiles,
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
    delta = row_delta(out, dout, lse, dlse)
    return selected_gradients(dout, q, k, v, lse, delta, block_indices, cu_seqlens, config, scale)


def selected_gradients(
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
    other_dq: tuple[Tensor, Tensor] | None = None,
    span: int | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; where out's gradient is w * dout, give lse - log(w) and delta / w.

    Args:
        lse: natural, as selected_forward returned it.
        delta: fp32 [T, H], tiles.row_delta's.
        other_dq: gradients of q from the other branches, to be added.
        span: tokens of a range; None for what the buffer of parts holds.
    """
    num_tokens, num_heads, key_width = q.shape
    if num_tokens == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    block = config.selection_block_size
    heads_per_group = num_heads // k.shape[1]
    tiles = backward_tiles(q.dtype, key_width, v.shape[2], heads_per_group, block)
    tiles_per_block = triton.cdiv(block, tiles.keys)
    parts_of_token = num_heads * block_indices.shape[-1] * tiles_per_block
    if span is None:
        span = range_span(parts_of_token, key_width, q.itemsize)
    lists = list_choices(block_indices, cu_seqlens, block, span, chunk_tokens)
    dq = torch.empty_like(q)
    parts_q = QueryParts.empty(q, min(span, num_tokens) * parts_of_token)
    sums = KeySums.empty(k, v, lists.max_slots, block)
    saved = (q, k, v, dout, lse, delta)
    for i_range in range(lists.num_ranges):
        some = slice(i_range * span, (i_range + 1) * span)
        _add_range(
            saved, parts_q, sums, lists, i_range, cu_seqlens, block, chunk_tokens, scale, tiles
        )
        others = None if other_dq is None else (other_dq[0][some], other_dq[1][some])
        merge_sum(parts_q, lists.places[some], tiles_per_block, dq[some], scale, others)
    return dq, sums.k.to(k.dtype), sums.v.to(v.dtype)


def _add_range(
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    parts_q: QueryParts,
    sums: KeySums,
    lists: ChoiceLists,
    i_range: int,
    cu_seqlens: Tensor,
    block: int,
    chunk_tokens: int,
    scale: float,
    tiles: Tiles,
) -> None:
    """Add a range of tokens to dk and dv, and write its parts of dq."""
    q, k, v, dout, _, _ = saved
    num_groups, num_sequences = k.shape[1], cu_seqlens.numel() - 1
    sizes = {
        "G": num_groups,
        "SELECTION_BLOCK": block,
        **key_widths(k.shape[2]),
        **value_widths(v.shape[2]),
        "TILE_KEYS": tiles.keys,
    }
    tiles_per_block = triton.cdiv(block, tiles.keys)
    chunk_starts, slots = lists.chunk_starts[i_range], lists.slots[i_range]
    all_sums = (sums.k, sums.v, sums.parts_k, sums.parts_v)
    selected_backward_kernel[(lists.chunk_lists.shape[1], tiles_per_block)](
        *saved, parts_q.rows, parts_q.peaks, *all_sums, lists.tokens, lists.starts[i_range],
        lists.chunk_lists[i_range], chunk_starts, slots, cu_seqlens, num_sequences,
        lists.num_blocks, chunk_tokens, log2_scale(scale), scale,
        R=q.shape[1] // num_groups,
        **sizes,
        IS_LONG=is_long(q, dout),
        PRECISION=tiles.precision,
        TILE_ROWS=tiles.rows,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
    selected_backward_sum_kernel[(lists.num_lists, tiles_per_block)](
        *all_sums, chunk_starts, slots, cu_seqlens, num_sequences, lists.num_blocks, **sizes
    )


def backward_tiles(
    dtype: torch.dtype, key_width: int, value_width: int, heads_per_group: int, block: int
) -> Tiles:
    """Tile sizes: k, v, dk and dv stay, the rows of several tokens stream.

    Two programs of four warps on a multiprocessor beat one of eight by a quarter at width 128.
    """
    keys = block_tile_keys(block)
    if dtype == torch.float32:
        tiles = fp32_tiles(key_width, value_width, max(32, heads_per_group))
        return replace(tiles, keys=min(keys, tiles.keys))
    return Tiles(64, keys, 4 if max(key_width, value_width) <= 128 else 8, 2)


@triton.jit
def _walk_tokens(
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
    p_parts,
    p_peaks,
    p_tokens,
    first,
    end,
    count,
    o_key,
    scale_log2,
    G: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_TAIL: tl.constexpr,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
    TILES: tl.constexpr,
    IS_LONG: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the tokens [first, end) of a chunk to dk / scale and dv; write their parts of dq.

    Tiles are transposed, [keys, rows], so that p and ds feed dv and dk as left operands. In another
    order of the products ptxas waits for each step of each by itself.
    """
    TOKENS: tl.constexpr = TILE_ROWS // R
    o_row = tl.arange(0, TILE_ROWS)
    o_part = o_row // R * (TILES * R) + o_row % R
    stride = tl.full([], TILES * R, tl.int64)
    # Known an iteration early, so that the gather of rows need not wait for its addresses.
    b_next, o_next, m_next = load_tokens(p_tokens, first, count, G, R, IS_LONG, TILE_ROWS)
    for i_entry in range(first, end, TOKENS):
        b_token, o_head, m_row = b_next, o_next, m_next
        b_next, o_next, m_next = load_tokens(
            p_tokens, i_entry + TOKENS, count, G, R, IS_LONG, TILE_ROWS
        )
        b_q = load_rows(p_q, o_head * K, m_row, 0, K_MAIN, K, True)
        b_logits = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        b_q_tail = b_q
        if K_TAIL > 0:
            b_q_tail = load_rows(p_q, o_head * K, m_row, K_MAIN, K_TAIL, K, True)
            b_logits = tl.dot(b_k_tail, tl.trans(b_q_tail), b_logits, input_precision=PRECISION)
        if MASKED:
            b_logits = tl.where(b_token[None, :] >= o_key[:, None], b_logits, float("-inf"))
        b_lse = log2_sum(p_lse, o_head, m_row)
        b_delta = tl.load(p_delta + o_head, mask=m_row, other=0.0)
        b_p = tl.exp2(b_logits * scale_log2 - b_lse[None, :])
        b_dout = load_rows(p_dout, o_head * V, m_row, 0, V_PADDED, V, True)
        b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision=PRECISION)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
        b_dq = tl.dot(tl.trans(b_ds), b_k, input_precision=PRECISION)
        first_part = i_entry * stride
        if p_peaks is not None:
            b_peak = tl.max(tl.abs(b_dq), 1)
        if K_TAIL > 0:
            b_dk_tail = tl.dot(b_ds, b_q_tail, b_dk_tail, input_precision=PRECISION)
            b_dq_tail = tl.dot(tl.trans(b_ds), b_k_tail, input_precision=PRECISION)
            if p_peaks is not None:
                b_peak = tl.maximum(b_peak, tl.max(tl.abs(b_dq_tail), 1))
        if p_peaks is not None:
            tl.store(p_peaks + first_part + o_part, b_peak, mask=m_row)
            # A peak so small that its inverse overflows is none in 16 bits either.
            b_inverse = tl.where(b_peak > 1e-37, 1.0 / tl.maximum(b_peak, 1e-37), 0.0)[:, None]
            b_dq = b_dq * b_inverse
            if K_TAIL > 0:
                b_dq_tail = b_dq_tail * b_inverse
        p_part = p_parts + first_part * K
        store_rows(p_part, b_dq, o_part * K, m_row, 0, K_MAIN, K)
        if K_TAIL > 0:
            store_rows(p_part, b_dq_tail, o_part * K, m_row, K_MAIN, K_TAIL, K)
    return b_dk, b_dk_tail, b_dv


@triton.jit(do_not_specialize=["num_sequences", "num_blocks"])
def selected_backward_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    parts_q,
    peaks_q,
    sum_k,
    sum_v,
    parts_k,
    parts_v,
    tokens,
    starts,
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
    IS_LONG: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of one key tile from one chunk of the tokens of its block, and their parts of dq.

    parts_q is laid out like by_block_forward_kernel's parts; peaks_q is what its rows lack.
    """
    TILES: tl.constexpr = (SELECTION_BLOCK + TILE_KEYS - 1) // TILE_KEYS
    IS_RAGGED: tl.constexpr = SELECTION_BLOCK % TILE_KEYS != 0
    i_list, chunk, begin, count = find_chunk(
        chunk_lists, chunk_starts, starts, tl.program_id(0), chunk_tokens, G * num_blocks
    )
    if count == 0:
        return
    i_group = i_list // num_blocks
    start, first_key, key_end = find_block(
        cu_seqlens, num_sequences, i_list % num_blocks, SELECTION_BLOCK, TILE_KEYS
    )
    o_tile = tl.arange(0, TILE_KEYS)
    m_key = first_key + o_tile < key_end
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
    # Keys that the block does not have lie after every token.
    o_key = tl.where(m_key, start + first_key + o_tile, 0x7FFFFFFF)

    p_tokens = tokens + begin
    first_row = i_group * R
    first_part = ((begin - tl.load(starts)) * TILES + tl.program_id(1)) * R
    p_parts = parts_q + first_part * K
    p_peaks = None
    if peaks_q is not None:
        p_peaks = peaks_q + first_part
    masked = count_masked(p_tokens, count, start + key_end, SELECTION_BLOCK, TILE_ROWS // R)
    b_dk, b_dk_tail, b_dv = _walk_tokens(
        b_dk, b_dk_tail, b_dv, b_k, b_k_tail, b_v, q + first_row * K, dout + first_row * V,
        lse + first_row, delta + first_row, p_parts, p_peaks, p_tokens, 0, masked, count, o_key,
        scale_log2,
        G, R, K, K_MAIN, K_TAIL, V, V_PADDED, TILES, IS_LONG, TILE_ROWS, PRECISION, True,
    )  # fmt: skip
    b_dk, b_dk_tail, b_dv = _walk_tokens(
        b_dk, b_dk_tail, b_dv, b_k, b_k_tail, b_v, q + first_row * K, dout + first_row * V,
        lse + first_row, delta + first_row, p_parts, p_peaks, p_tokens, masked, count, count,
        o_key, scale_log2,
        G, R, K, K_MAIN, K_TAIL, V, V_PADDED, TILES, IS_LONG, TILE_ROWS, PRECISION, IS_RAGGED,
    )  # fmt: skip

    slot = tl.load(slots + i_list)
    b_dk = b_dk * scale
    b_dk_tail = b_dk_tail * scale
    if slot < 0:
        grow_rows(sum_k + key_row * K, b_dk, o_tile * (G * K), m_key, 0, K_MAIN, K)
        grow_rows(sum_v + key_row * V, b_dv, o_tile * (G * V), m_key, 0, V_PADDED, V)
        if K_TAIL > 0:
            grow_rows(sum_k + key_row * K, b_dk_tail, o_tile * (G * K), m_key, K_MAIN, K_TAIL, K)
    else:
        part = (slot + chunk).to(tl.int64) * SELECTION_BLOCK + tl.program_id(1) * TILE_KEYS
        store_rows(parts_k + part * K, b_dk, o_tile * K, m_key, 0, K_MAIN, K)
        store_rows(parts_v + part * V, b_dv, o_tile * V, m_key, 0, V_PADDED, V)
        if K_TAIL > 0:
            store_rows(parts_k + part * K, b_dk_tail, o_tile * K, m_key, K_MAIN, K_TAIL, K)
