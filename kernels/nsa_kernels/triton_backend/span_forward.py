"""Attention over one contiguous span of keys per query: compressed, sliding and full, forward.

The three differ only in which keys a position sees (tiles.visible_low and visible_high), so one
kernel serves them. A program holds a tile of queries with all heads of their group and walks the
key tiles that the tile can see: those at a window's left edge and at the causal edge are masked,
those between are not.
"""

# Jitted functions and their launches have no types that a checker knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.packing import num_tiles
from nsa_kernels.shapes import NsaConfig, compressed_cu_seqlens
from nsa_kernels.triton_backend.tiles import (
    LN_2,
    Tiles,
    descriptors,
    find_tile,
    fp32_tiles,
    key_widths,
    load_rows,
    log2_scale,
    store_rows,
    value_widths,
    visible_high,
    visible_low,
)

# With key tiles from the copy engine, two stages and 128 registers a thread let two programs of
# eight warps share a multiprocessor: one's softmax then runs beside the other's products.
_COPIED_STAGES = 2
_COPIED_REGISTERS = 128


@dataclass(frozen=True, slots=True)
class Span:
    """Which keys a query sees: complete blocks of `block` tokens every `stride`, or a window."""

    cu_keys: Tensor
    """int32 [B+1], where each sequence's keys start."""
    block: int = 1
    stride: int = 1
    window: int = 0
    """Tokens of the window; 0 for none."""
    has_spare_keys: bool = False
    """Whether keys may lie past the last sequence's."""

    @property
    def constants(self) -> dict[str, int]:
        """What the kernels compile in."""
        return {"BLOCK": self.block, "STRIDE": self.stride, "WINDOW": self.window}


def compressed_span(cu_seqlens: Tensor, config: NsaConfig) -> Span:
    """Complete compression blocks: i is seen by t iff i * d + l - 1 <= t."""
    return Span(
        compressed_cu_seqlens(cu_seqlens, config),
        block=config.compression_block_size,
        stride=config.compression_stride,
        has_spare_keys=True,
    )


def sliding_span(cu_seqlens: Tensor, config: NsaConfig) -> Span:
    """The last w tokens, the query's own among them."""
    return Span(cu_seqlens, window=config.window_size)


def full_span(cu_seqlens: Tensor) -> Span:
    """All tokens up to the query's own."""
    return Span(cu_seqlens)


def compressed_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, config: NsaConfig, scale: float
) -> tuple[Tensor, Tensor]:
    """out [T, H, V] and natural lse [T, H] over k, v [C, G, K/V]; spare rows are not read."""
    return span_forward(q, k, v, cu_seqlens, compressed_span(cu_seqlens, config), scale)


def sliding_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, config: NsaConfig, scale: float
) -> tuple[Tensor, Tensor]:
    """out [T, H, V] and natural lse [T, H] over the last w tokens of k, v [T, G, K/V]."""
    return span_forward(q, k, v, cu_seqlens, sliding_span(cu_seqlens, config), scale)


def full_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """out [T, H, V] and natural lse [T, H] over all earlier tokens of k, v [T, G, K/V]."""
    return span_forward(q, k, v, cu_seqlens, full_span(cu_seqlens), scale)


def span_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, span: Span, scale: float
) -> tuple[Tensor, Tensor]:
    """Launch span_forward_kernel.

    Source:
        The loop is FlashAttention-2's (arXiv 2307.08691, Algorithm 1), with the heads of a group
        packed into the rows of a tile.
    """
    num_tokens, num_heads, key_width = q.shape
    _, num_groups, value_width = v.shape
    out = q.new_empty(num_tokens, num_heads, value_width)
    lse = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=q.device)
    if num_tokens == 0:
        return out, lse
    heads_per_group = num_heads // num_groups
    tiles = span_forward_tiles(q.dtype, key_width, value_width, heads_per_group, span)
    k_descriptor, v_descriptor, options = None, None, {}
    if _gains_by_copies(tiles, q, k, v):
        k_descriptor, v_descriptor = descriptors(tiles.keys, k, v)
    if k_descriptor is not None:
        tiles = replace(tiles, num_stages=_COPIED_STAGES)
        options = {"maxnreg": _COPIED_REGISTERS}
    num_sequences = cu_seqlens.numel() - 1
    count = num_tiles(num_tokens, num_sequences, tiles.rows // heads_per_group)
    span_forward_kernel[(count * num_groups,)](
        q, k, v, k_descriptor, v_descriptor, out, lse, cu_seqlens, span.cu_keys, num_sequences,
        log2_scale(scale),
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
        **options,
    )  # fmt: skip
    return out, lse


def span_forward_tiles(
    dtype: torch.dtype, key_width: int, value_width: int, heads_per_group: int, span: Span
) -> Tiles:
    """Tile sizes by width. rows is at least R: a tile holds whole tokens.

    128 rows halve the traffic of keys against 64, and eight warps keep them in registers (four
    spill at width 128). A causal walk over all tokens is long enough for wider key tiles.
    """
    width = max(key_width, value_width)
    if dtype == torch.float32:
        return fp32_tiles(key_width, value_width, max(32, heads_per_group))
    if width <= 64:
        return Tiles(128, 64, 4, 3)
    if width <= 128 and span.stride == 1 and not span.window:
        return Tiles(128, 128, 8, 2)
    if width <= 192:
        return Tiles(128, 64, 8, 3)
    return Tiles(128, 64, 8, 2)


def _gains_by_copies(tiles: Tiles, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether this is the kind of launch that was measured to be faster with descriptors."""
    is_measured = (tiles.rows, tiles.keys, tiles.num_warps) == (128, 64, 8)
    return is_measured and q.itemsize == 2 and max(k.shape[2], v.shape[2]) == 128


@triton.jit
def _attend_keys(
    b_out,
    b_max,
    b_sum,
    b_q,
    b_q_tail,
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
    """Fold the key tiles of [first, end) into the running output, maximum and sum of each row.

    Unless MASKED, all of their keys are seen by every row; descriptors are None or used for these.
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
        if MASKED:
            m_seen = (o_key[None, :] >= o_low[:, None]) & (o_key[None, :] < o_high[:, None])
            b_logits = tl.where(m_seen, b_logits, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_logits, 1) * scale_log2)
        b_shift = b_new_max
        if MASKED:
            # A row that has seen no key yet would compute -inf - -inf.
            b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2(b_logits * scale_log2 - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        if HAS_DESCRIPTORS:
            b_v = v_descriptor.load([key_start + i_key, i_group * V])
        else:
            b_v = load_rows(p_v + i_key * v_stride, o_tile * (G * V), m_key, 0, V_PADDED, V, MASKED)
        b_out = b_out * b_decay[:, None]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision=PRECISION)
        b_max = b_new_max
    return b_out, b_max, b_sum


@triton.jit(do_not_specialize=["num_sequences"])
def span_forward_kernel(
    q,
    k,
    v,
    k_descriptor,
    v_descriptor,
    out,
    lse,
    cu_seqlens,
    cu_keys,
    num_sequences,
    scale_log2,
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
    """out and lse of one tile of queries of one group.

    Late tiles, which see most, start first; the groups of a tile run together, as their queries
    and keys lie side by side in memory.
    """
    TOKENS: tl.constexpr = TILE_ROWS // R
    H: tl.constexpr = G * R
    i_group = tl.program_id(0) % G
    i_tile = tl.num_programs(0) // G - 1 - tl.program_id(0) // G
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
    b_q_tail = b_q
    if K_TAIL > 0:
        b_q_tail = load_rows(q + row * K, o_head * K, m_row, K_MAIN, K_TAIL, K, True)
    b_out = tl.zeros([TILE_ROWS, V_PADDED], tl.float32)
    b_max = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([TILE_ROWS], tl.float32)

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
        # Keys that the last token no longer sees.
        edge = visible_low(t_last, WINDOW) - low
        open_low = low + (edge + TILE_KEYS - 1) // TILE_KEYS * TILE_KEYS
        b_out, b_max, b_sum = _attend_keys(
            b_out, b_max, b_sum, b_q, b_q_tail, p_k, p_v, k_descriptor, v_descriptor, key_start,
            i_group, low, tl.minimum(open_low, high), high, o_low, o_high, scale_log2,
            G, K, K_MAIN, K_TAIL, V, V_PADDED, TILE_KEYS, PRECISION, True,
        )  # fmt: skip
    # Keys that the first token sees already are in [open_low, open_high).
    open_keys = tl.maximum(visible_high(t_first, BLOCK, STRIDE) - open_low, 0)
    open_high = open_low + open_keys // TILE_KEYS * TILE_KEYS
    b_out, b_max, b_sum = _attend_keys(
        b_out, b_max, b_sum, b_q, b_q_tail, p_k, p_v, k_descriptor, v_descriptor, key_start,
        i_group, open_high, high, high, o_low, o_high, scale_log2,
        G, K, K_MAIN, K_TAIL, V, V_PADDED, TILE_KEYS, PRECISION, True,
    )  # fmt: skip
    b_out, b_max, b_sum = _attend_keys(
        b_out, b_max, b_sum, b_q, b_q_tail, p_k, p_v, k_descriptor, v_descriptor, key_start,
        i_group, open_low, open_high, high, o_low, o_high, scale_log2,
        G, K, K_MAIN, K_TAIL, V, V_PADDED, TILE_KEYS, PRECISION, False,
    )  # fmt: skip

    # A row without any key has sum 0 and keeps output 0 and lse -inf.
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    store_rows(out + row * V, b_out / b_sum[:, None], o_head * V, m_row, 0, V_PADDED, V)
    tl.store(lse + row + o_head, (b_max + tl.log2(b_sum)) * LN_2, mask=m_row)
