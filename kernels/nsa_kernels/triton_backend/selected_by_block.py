"""Selected attention by key blocks, forward: each block meets the tokens that chose it.

A program loads one selection block and walks a chunk of the list of choices that name it, several
tokens with all heads of the group at a time: keys are read once for many tokens, and small groups
fill a tile as well as large ones. What a block contributes to a token is left as a part, softmax
inside the block; a second kernel joins the parts of each token (selected_merge).
"""

# Jitted functions and their launches have no types that a checker knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.shapes import NsaConfig
from nsa_kernels.triton_backend.selected_lists import list_choices
from nsa_kernels.triton_backend.selected_merge import merge_softmax
from nsa_kernels.triton_backend.tiles import (
    Tiles,
    find_tile,
    fp32_tiles,
    key_widths,
    load_rows,
    log2_scale,
    store_rows,
    value_widths,
)

# Bytes of parts alive at once: ranges of tokens go through one after the other.
_PART_BYTES = 2**31
# Choices of a chunk: a small share of the work of one multiprocessor, yet many times what loading
# the block costs.
CHUNK_TOKENS = 256


def range_span(parts_of_token: int, width: int, itemsize: int) -> int:
    """Tokens whose parts, rows of `width` elements, fit into the buffer."""
    return max(64, _PART_BYTES // (parts_of_token * width * itemsize))


def block_tile_keys(selection_block: int) -> int:
    """Keys of a tile inside a selection block: a power of two that tl.dot takes, at most 64."""
    return int(min(64, max(16, triton.next_power_of_2(selection_block))))


def by_block_tiles(
    dtype: torch.dtype, key_width: int, value_width: int, heads_per_group: int, block: int
) -> Tiles:
    """Tile sizes of the forward pass by blocks: keys and values stay, queries stream.

    64 rows and four warps leave room for three programs on a multiprocessor, which hide each
    other's waits; 128 rows spill.
    """
    keys = block_tile_keys(block)
    if dtype == torch.float32:
        tiles = fp32_tiles(key_width, value_width, max(32, heads_per_group))
        return replace(tiles, keys=min(keys, tiles.keys))
    return Tiles(64, keys, 4, 3)


def forward_by_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    config: NsaConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [T, H, V] and natural lse [T, H] of selected attention."""
    num_tokens, num_heads, key_width = q.shape
    _, num_groups, value_width = v.shape
    heads_per_group = num_heads // num_groups
    block = config.selection_block_size
    out = q.new_empty(num_tokens, num_heads, value_width)
    lse = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=q.device)
    tiles = by_block_tiles(q.dtype, key_width, value_width, heads_per_group, block)
    tiles_per_block = triton.cdiv(block, tiles.keys)
    parts_of_token = num_heads * block_indices.shape[-1] * tiles_per_block
    span = range_span(parts_of_token, value_width, q.itemsize)
    lists = list_choices(block_indices, cu_seqlens, block, span, CHUNK_TOKENS)
    rows = min(span, num_tokens) * parts_of_token
    parts = q.new_empty(rows, value_width)
    part_lse = torch.empty(rows, dtype=torch.float32, device=q.device)
    for i_range in range(lists.num_ranges):
        by_block_forward_kernel[(lists.chunk_lists.shape[1], tiles_per_block)](
            q, k, v, parts, part_lse, lists.tokens, lists.starts[i_range],
            lists.chunk_lists[i_range], lists.chunk_starts[i_range], cu_seqlens,
            cu_seqlens.numel() - 1, lists.num_blocks, CHUNK_TOKENS, log2_scale(scale),
            G=num_groups,
            R=heads_per_group,
            SELECTION_BLOCK=block,
            **key_widths(key_width),
            **value_widths(value_width),
            IS_LONG=is_long(q, out),
            PRECISION=tiles.precision,
            TILE_ROWS=tiles.rows,
            TILE_KEYS=tiles.keys,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )  # fmt: skip
        some = slice(i_range * span, (i_range + 1) * span)
        merge_softmax(parts, part_lse, lists.places[some], tiles_per_block, out[some], lse[some])
    return out, lse


def is_long(*tensors: Tensor) -> bool:
    """Whether an element of one of them lies further from its start than 32 bits can say."""
    return max(tensor.numel() for tensor in tensors) >= 2**31


@triton.jit
def find_chunk(chunk_lists, chunk_starts, starts, i_chunk, chunk_tokens, num_lists):
    """(list, chunk within it, its first place, tokens) of a chunk; no tokens past the last one."""
    i_list = tl.load(chunk_lists + i_chunk)
    i_inside = tl.minimum(i_list, num_lists - 1)
    chunk = i_chunk - tl.load(chunk_starts + i_inside)
    begin = tl.load(starts + i_inside) + chunk.to(tl.int64) * chunk_tokens
    count = tl.minimum(tl.load(starts + i_inside + 1) - begin, chunk_tokens).to(tl.int32)
    return i_inside, chunk, begin, tl.where(i_list < num_lists, count, 0)


@triton.jit
def find_block(
    cu_seqlens, num_sequences, i_block, SELECTION_BLOCK: tl.constexpr, TILE_KEYS: tl.constexpr
):
    """(sequence start, first key of the block's tile program_id(1), end of the block).

    Keys count within their sequence. The tile is empty if its first key is not below the end.
    """
    _, start, length, first = find_tile(cu_seqlens, num_sequences, i_block, SELECTION_BLOCK)
    end = tl.minimum(length, first + SELECTION_BLOCK)
    first += tl.program_id(1) * TILE_KEYS
    return start, first, end


@triton.jit
def count_masked(p_tokens, count, key_end, SELECTION_BLOCK: tl.constexpr, TOKENS: tl.constexpr):
    """Tokens of a chunk, in whole tiles, among which are all that lie in the block themselves.

    They are its first, as lists ascend; key_end counts packed tokens. Later tokens see all keys.
    """
    most = (SELECTION_BLOCK + TOKENS - 1) // TOKENS * TOKENS
    return tl.where(tl.load(p_tokens) < key_end, tl.minimum(count, most), 0)


@triton.jit
def load_tokens(
    p_tokens,
    first,
    count,
    G: tl.constexpr,
    R: tl.constexpr,
    IS_LONG: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """(packed token, row of q counted from the group's first head, whether it is one) of each row.

    Row r of a tile is head r % R of token r // R of the list; a tile holds whole tokens.
    """
    o_row = tl.arange(0, TILE_ROWS)
    o_entry = first + o_row // R
    m_row = (o_entry < count) & (o_row < TILE_ROWS // R * R)
    b_token = tl.load(p_tokens + o_entry, mask=m_row, other=0)
    o_head = b_token
    if IS_LONG:
        o_head = o_head.to(tl.int64)
    return b_token, o_head * (G * R) + o_row % R, m_row


@triton.jit
def _attend_tokens(
    b_k,
    b_k_tail,
    b_v,
    p_q,
    p_parts,
    p_part_lse,
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
    """Parts of the tokens [first, end) of a chunk; o_key counts packed tokens."""
    TOKENS: tl.constexpr = TILE_ROWS // R
    o_row = tl.arange(0, TILE_ROWS)
    o_part = o_row // R * (TILES * R) + o_row % R
    stride = tl.full([], TILES * R, tl.int64)
    for i_entry in range(first, end, TOKENS):
        b_token, o_head, m_row = load_tokens(p_tokens, i_entry, count, G, R, IS_LONG, TILE_ROWS)
        b_q = load_rows(p_q, o_head * K, m_row, 0, K_MAIN, K, True)
        b_logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if K_TAIL > 0:
            b_q_tail = load_rows(p_q, o_head * K, m_row, K_MAIN, K_TAIL, K, True)
            b_logits = tl.dot(b_q_tail, tl.trans(b_k_tail), b_logits, input_precision=PRECISION)
        if MASKED:
            b_logits = tl.where(b_token[:, None] >= o_key[None, :], b_logits, float("-inf"))
        b_max = tl.max(b_logits, 1) * scale_log2
        b_shift = b_max
        if MASKED:
            # A tile of a block may lie after the token as a whole; -inf - -inf would come up.
            b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_p = tl.exp2(b_logits * scale_log2 - b_shift[:, None])
        b_sum = tl.sum(b_p, 1)
        if MASKED:
            b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION) * (1.0 / b_sum)[:, None]
        first_part = i_entry * stride
        store_rows(p_parts + first_part * V, b_out, o_part * V, m_row, 0, V_PADDED, V)
        tl.store(p_part_lse + first_part + o_part, b_max + tl.log2(b_sum), mask=m_row)


@triton.jit(do_not_specialize=["num_sequences", "num_blocks"])
def by_block_forward_kernel(
    q,
    k,
    v,
    parts,
    part_lse,
    tokens,
    starts,
    chunk_lists,
    chunk_starts,
    cu_seqlens,
    num_sequences,
    num_blocks,
    chunk_tokens,
    scale_log2,
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
    """Parts and their lse in base 2 of one key tile and one chunk of the tokens of its block.

    What head r of the token at place p of the range's lists gets from tile i of a block lies in
    row (p * tiles of a block + i) * R + r.
    """
    TILES: tl.constexpr = (SELECTION_BLOCK + TILE_KEYS - 1) // TILE_KEYS
    IS_RAGGED: tl.constexpr = SELECTION_BLOCK % TILE_KEYS != 0
    i_list, _, begin, count = find_chunk(
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
    b_k_tail = b_k
    if K_TAIL > 0:
        b_k_tail = load_rows(k + key_row * K, o_tile * (G * K), m_key, K_MAIN, K_TAIL, K, True)
    # Keys that the block does not have lie after every token.
    o_key = tl.where(m_key, start + first_key + o_tile, 0x7FFFFFFF)

    p_tokens = tokens + begin
    p_q = q + i_group * (R * K)
    first_part = ((begin - tl.load(starts)) * TILES + tl.program_id(1)) * R
    p_parts, p_part_lse = parts + first_part * V, part_lse + first_part
    masked = count_masked(p_tokens, count, start + key_end, SELECTION_BLOCK, TILE_ROWS // R)
    _attend_tokens(
        b_k, b_k_tail, b_v, p_q, p_parts, p_part_lse, p_tokens, 0, masked, count, o_key, scale_log2,
        G, R, K, K_MAIN, K_TAIL, V, V_PADDED, TILES, IS_LONG, TILE_ROWS, PRECISION, True,
    )  # fmt: skip
    _attend_tokens(
        b_k, b_k_tail, b_v, p_q, p_parts, p_part_lse, p_tokens, masked, count, count, o_key,
        scale_log2,
        G, R, K, K_MAIN, K_TAIL, V, V_PADDED, TILES, IS_LONG, TILE_ROWS, PRECISION, IS_RAGGED,
    )  # fmt: skip
