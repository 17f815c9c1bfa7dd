"""Attention over the n selection blocks that a token's group chose, forward.

Large groups: a program holds a few neighbouring tokens with the R heads of one group and walks the
union of their choices (selected_union), so that a block is loaded once for all that chose it.
Small groups would need many tokens to fill a tile, whose union is wide: they go by key blocks
(selected_by_block).
"""

# Jitted functions and their launches have no types that a checker knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.shapes import NsaConfig
from nsa_kernels.triton_backend.selected_by_block import block_tile_keys, forward_by_block
from nsa_kernels.triton_backend.selected_union import unite_choices
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
)

# Heads of a group from which a few tokens fill a matrix product.
_LEAST_HEADS = 16


def selected_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    config: NsaConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [T, H, V] and natural lse [T, H]; block_indices int32 [T, G, n], any order, -1 none."""
    num_tokens, num_heads, _ = q.shape
    _, num_groups, value_width = v.shape
    if num_tokens == 0:
        return q.new_empty(0, num_heads, value_width), q.new_empty(q.shape[:2], dtype=torch.float32)
    is_large = num_heads // num_groups >= _LEAST_HEADS
    forward = forward_by_tile if is_large else forward_by_block
    return forward(q, k, v, block_indices, cu_seqlens, config, scale)


def forward_by_tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    config: NsaConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out and lse of selected attention, tile of tokens by tile of tokens."""
    num_tokens, num_heads, key_width = q.shape
    _, num_groups, value_width = v.shape
    heads_per_group = num_heads // num_groups
    block = config.selection_block_size
    tiles = by_tile_tiles(q.dtype, key_width, value_width, heads_per_group, block)
    union = unite_choices(block_indices, cu_seqlens, block, tiles.rows // heads_per_group)
    out = q.new_empty(num_tokens, num_heads, value_width)
    lse = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=q.device)
    selected_forward_kernel[union.counts.shape[:2]](
        q, k, v, *descriptors(tiles.keys, k, v), union.entries, union.counts, out, lse,
        cu_seqlens, cu_seqlens.numel() - 1, log2_scale(scale),
        G=num_groups,
        R=heads_per_group,
        PLACES=union.entries.shape[2],
        SELECTION_BLOCK=block,
        **key_widths(key_width),
        **value_widths(value_width),
        PRECISION=tiles.precision,
        TILE_ROWS=tiles.rows,
        TILE_KEYS=tiles.keys,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
    return out, lse


def by_tile_tiles(
    dtype: torch.dtype, key_width: int, value_width: int, heads_per_group: int, block: int
) -> Tiles:
    """Tile sizes of the walk over unions: four tokens of 16 heads fill the 64 rows of a product.

    Three stages have the keys of two blocks on their way, and at width 128 leave room for a second
    program on a multiprocessor. Eight warps would share 64 rows at half the speed of four, so
    wider heads get fewer stages, then fewer keys.
    """
    keys = block_tile_keys(block)
    if dtype == torch.float32:
        tiles = fp32_tiles(key_width, value_width, heads_per_group)
        return replace(tiles, keys=min(keys, tiles.keys))
    if max(key_width, value_width) <= 128:
        return Tiles(64, keys, 4, 3)
    if key_width <= 192 and value_width <= 128:
        return Tiles(64, keys, 4, 2)
    return Tiles(64, min(keys, 32), 4, 2)


@triton.jit
def _attend_blocks(
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
    p_entries,
    first,
    end,
    length,
    o_position,
    i_token,
    scale_log2,
    TOKENS: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_TAIL: tl.constexpr,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
    SELECTION_BLOCK: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold the key tiles [first, end) of the union into the running output, maximum and sum.

    Unless MASKED, the blocks lie before every token of the tile.
    """
    TILES: tl.constexpr = (SELECTION_BLOCK + TILE_KEYS - 1) // TILE_KEYS
    IS_RAGGED: tl.constexpr = MASKED or SELECTION_BLOCK % TILE_KEYS != 0
    o_tile = tl.arange(0, TILE_KEYS)
    k_stride = tl.full([], G * K, tl.int64)
    v_stride = tl.full([], G * V, tl.int64)
    HAS_DESCRIPTORS: tl.constexpr = not IS_RAGGED and k_descriptor is not None
    # Known an iteration early, so that the loads of keys need not wait for their own address.
    next_entry = tl.load(p_entries + first // TILES, mask=first < end, other=0)
    # The masked blocks are few: what they would prefetch takes a program's place.
    for i_tile in tl.range(first, end, num_stages=2 if MASKED else None):
        entry = next_entry
        next_entry = tl.load(p_entries + (i_tile + 1) // TILES, mask=i_tile + 1 < end, other=0)
        i_block = entry >> TOKENS
        first_key = i_block * SELECTION_BLOCK + i_tile % TILES * TILE_KEYS
        o_key = first_key + o_tile
        m_key = (o_key < (i_block + 1) * SELECTION_BLOCK) & (o_key < length)
        if HAS_DESCRIPTORS:
            b_k = k_descriptor.load([key_start + first_key, i_group * K])
        else:
            b_k = load_rows(
                p_k + first_key * k_stride, o_tile * (G * K), m_key, 0, K_MAIN, K, IS_RAGGED
            )
        b_logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if K_TAIL > 0:
            b_k_tail = load_rows(
                p_k + first_key * k_stride, o_tile * (G * K), m_key, K_MAIN, K_TAIL, K, IS_RAGGED
            )
            b_logits = tl.dot(b_q_tail, tl.trans(b_k_tail), b_logits, input_precision=PRECISION)
        m_seen = ((entry >> i_token) & 1 != 0)[:, None]
        if IS_RAGGED:
            m_seen = m_seen & m_key[None, :]
        if MASKED:
            m_seen = m_seen & (o_key[None, :] <= o_position[:, None])
        b_logits = tl.where(m_seen, b_logits, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_logits, 1) * scale_log2)
        # As long as a row has seen no key, -inf - -inf would come up.
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2(b_logits * scale_log2 - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        if HAS_DESCRIPTORS:
            b_v = v_descriptor.load([key_start + first_key, i_group * V])
        else:
            b_v = load_rows(
                p_v + first_key * v_stride, o_tile * (G * V), m_key, 0, V_PADDED, V, IS_RAGGED
            )
        b_out = b_out * b_decay[:, None]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision=PRECISION)
        b_max = b_new_max
    return b_out, b_max, b_sum


@triton.jit(do_not_specialize=["num_sequences"])
def selected_forward_kernel(
    q,
    k,
    v,
    k_descriptor,
    v_descriptor,
    entries,
    counts,
    out,
    lse,
    cu_seqlens,
    num_sequences,
    scale_log2,
    G: tl.constexpr,
    R: tl.constexpr,
    PLACES: tl.constexpr,
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
    """out and lse of one tile of tokens of one group; late tiles, which choose most, come first."""
    TOKENS: tl.constexpr = TILE_ROWS // R
    TILES: tl.constexpr = (SELECTION_BLOCK + TILE_KEYS - 1) // TILE_KEYS
    H: tl.constexpr = G * R
    i_group = tl.program_id(1)
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    _, start, length, t_first = find_tile(cu_seqlens, num_sequences, i_tile, TOKENS)
    if t_first >= length:
        return
    o_row = tl.arange(0, TILE_ROWS)
    i_token = o_row // R
    o_position = t_first + i_token
    m_row = (o_position < length) & (o_row < TOKENS * R)
    o_head = i_token * H + o_row % R
    row = (start + t_first).to(tl.int64) * H + i_group * R

    b_q = load_rows(q + row * K, o_head * K, m_row, 0, K_MAIN, K, True)
    b_q_tail = b_q
    if K_TAIL > 0:
        b_q_tail = load_rows(q + row * K, o_head * K, m_row, K_MAIN, K_TAIL, K, True)
    b_out = tl.zeros([TILE_ROWS, V_PADDED], tl.float32)
    b_max = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([TILE_ROWS], tl.float32)

    key_row = start.to(tl.int64) * G + i_group
    p_k, p_v = k + key_row * K, v + key_row * V
    i_union = i_tile.to(tl.int64) * G + i_group
    p_entries = entries + i_union * PLACES
    open_blocks = tl.load(counts + i_union * 2)
    all_blocks = tl.load(counts + i_union * 2 + 1)
    b_out, b_max, b_sum = _attend_blocks(
        b_out, b_max, b_sum, b_q, b_q_tail, p_k, p_v, k_descriptor, v_descriptor, start, i_group,
        p_entries, 0, open_blocks * TILES, length, o_position, i_token, scale_log2,
        TOKENS, G, K, K_MAIN, K_TAIL, V, V_PADDED, SELECTION_BLOCK, TILE_KEYS, PRECISION, False,
    )  # fmt: skip
    b_out, b_max, b_sum = _attend_blocks(
        b_out, b_max, b_sum, b_q, b_q_tail, p_k, p_v, k_descriptor, v_descriptor, start, i_group,
        p_entries, open_blocks * TILES, all_blocks * TILES, length, o_position, i_token,
        scale_log2,
        TOKENS, G, K, K_MAIN, K_TAIL, V, V_PADDED, SELECTION_BLOCK, TILE_KEYS, PRECISION, True,
    )  # fmt: skip

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    store_rows(out + row * V, b_out / b_sum[:, None], o_head * V, m_row, 0, V_PADDED, V)
    tl.store(lse + row + o_head, (b_max + tl.log2(b_sum)) * LN_2, mask=m_row)
