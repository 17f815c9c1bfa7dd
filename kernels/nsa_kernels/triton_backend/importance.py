"""Importance of selection blocks from the compressed branch (Eq. 8-10) over packed sequences."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.packing import num_tiles
from nsa_kernels.shapes import NsaConfig, compressed_cu_seqlens
from nsa_kernels.triton_backend.paged_parts import load_split, score_split
from nsa_kernels.triton_backend.tiles import (
    LOG2_E,
    Tiles,
    descriptors,
    find_tile,
    key_widths,
    log2_sum,
    register_limit,
    visible_high,
)
from nsa_kernels.triton_backend.topn import top_blocks

# Bytes of importances alive at once: queries go through in runs of whole tiles.
_BUFFER_BYTES = 256 * 2**20
# Registers of a thread, with which three programs of 16 bits share a multiprocessor.
_COPIED_REGISTERS = 168


@triton.jit
def sum_over_heads(
    q,
    q_descriptor,
    first_row,
    first_head,
    lse,
    o_head,
    m_row,
    b_k,
    b_k_tail,
    visible,
    scale_log2,
    R: tl.constexpr,
    K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_TAIL: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_C: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Attention probabilities [TILE_Q, TILE_C] of a tile of compressed keys, summed over R heads.

    Head by head in registers: any group size fits without padding, and no thread waits for
    another. The next head's lse is asked for while this head's scores are made. The descriptor is
    None or used where not MASKED.
    """
    HAS_DESCRIPTOR: tl.constexpr = not MASKED and q_descriptor is not None
    b_sum = tl.zeros([TILE_Q, TILE_C], tl.float32)
    b_lse = log2_sum(lse, o_head, m_row)
    for i_head in range(R):
        if HAS_DESCRIPTOR:
            b_q = q_descriptor.load([first_row, (first_head + i_head) * K])
            b_q_tail = b_q
        else:
            b_q, b_q_tail = load_split(q, (o_head + i_head) * K, m_row, K, K_MAIN, K_TAIL)
        score = score_split(b_q, b_q_tail, b_k, b_k_tail, K_TAIL)
        b_next = log2_sum(lse, o_head + tl.minimum(i_head + 1, R - 1), m_row)
        b_p = tl.exp2(score * scale_log2 - b_lse[:, None])
        if MASKED:
            b_p = tl.where(visible, b_p, 0.0)
        b_sum += b_p
        b_lse = b_next
    return b_sum


@triton.jit
def span_importance_kernel(
    q,
    q_descriptor,
    k_cmp,
    lse,
    cu_seqlens,
    cu_seqlens_cmp,
    importance,
    carry,
    row_positions,
    row_tokens,
    scale_log2,
    first_tile,
    num_sequences,
    G,
    S,
    R: tl.constexpr,
    K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_TAIL: tl.constexpr,
    COMPRESSION_BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    SELECTION_BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_S: tl.constexpr,
    STRIDES_PADDED: tl.constexpr,
):
    """Write importance and carry [tiles * TILE_Q, G, S] of a tile of queries, one group, TILE_S
    blocks.

    A compressed block counts for the selection block in which it starts, and with the strides that
    reach beyond it for the next one: the importance of block j is importance[j] + carry[j], the
    first of them without a carry.
    Only blocks that a query of the tile may choose are written, and none while each query chooses
    every block it has. The first column of programs also writes each row's position (-1: no query)
    and packed token. Programs that run together share their queries, which are the larger part.
    """
    i_tile = tl.program_id(1)
    i_group = tl.program_id(2)
    first_block = tl.program_id(0) * TILE_S
    i_sequence, begin, length, start = find_tile(
        cu_seqlens, num_sequences, first_tile + i_tile, TILE_Q
    )
    o_position = start + tl.arange(0, TILE_Q)
    m_row = o_position < length
    o_row = i_tile * TILE_Q + tl.arange(0, TILE_Q)
    if (first_block == 0) & (i_group == 0):
        tl.store(row_positions + o_row, tl.where(m_row, o_position, -1))
        tl.store(row_tokens + o_row, begin + o_position)
    last_position = tl.minimum(start + TILE_Q, length) - 1
    last_block = last_position // SELECTION_BLOCK
    if (start >= length) | (last_block < CHOSEN) | (first_block > last_block):
        return
    BLOCK_STRIDES: tl.constexpr = COMPRESSION_BLOCK // STRIDE
    SELECTION_STRIDES: tl.constexpr = SELECTION_BLOCK // STRIDE
    TILE_C: tl.constexpr = TILE_S * STRIDES_PADDED
    begin_cmp = tl.load(cu_seqlens_cmp + i_sequence).to(tl.int64)
    o_column = tl.arange(0, TILE_C)
    o_stride = o_column % STRIDES_PADDED
    o_cmp = (first_block + o_column // STRIDES_PADDED) * SELECTION_STRIDES + o_stride
    m_column = o_stride < SELECTION_STRIDES
    num_keys = visible_high(last_position, COMPRESSION_BLOCK, STRIDE)
    o_key = ((begin_cmp + o_cmp) * G + i_group) * K
    b_k, b_k_tail = load_split(k_cmp, o_key, m_column & (o_cmp < num_keys), K, K_MAIN, K_TAIL)
    o_head = (begin.to(tl.int64) + o_position) * (G * R) + i_group * R
    num_visible = visible_high(o_position, COMPRESSION_BLOCK, STRIDE)
    visible = m_column[None, :] & (o_cmp[None, :] < num_visible[:, None])
    is_full = start + TILE_Q <= length
    all_visible = (first_block + TILE_S) * SELECTION_STRIDES <= visible_high(
        start, COMPRESSION_BLOCK, STRIDE
    )
    if is_full & all_visible & (STRIDES_PADDED == SELECTION_STRIDES):
        b_sum = sum_over_heads(
            q, q_descriptor, begin + start, i_group * R, lse, o_head, m_row, b_k, b_k_tail,
            visible, scale_log2, R, K, K_MAIN, K_TAIL, TILE_Q, TILE_C, False,
        )  # fmt: skip
    else:
        b_sum = sum_over_heads(
            q, q_descriptor, begin + start, i_group * R, lse, o_head, m_row, b_k, b_k_tail,
            visible, scale_log2, R, K, K_MAIN, K_TAIL, TILE_Q, TILE_C, True,
        )  # fmt: skip
    b_sum = tl.reshape(b_sum, [TILE_Q, TILE_S, STRIDES_PADDED])
    o_first = tl.arange(0, STRIDES_PADDED)
    own = tl.minimum(o_first + BLOCK_STRIDES, SELECTION_STRIDES) - o_first
    beyond = tl.maximum(o_first + BLOCK_STRIDES - SELECTION_STRIDES, 0)
    o_block = first_block + tl.arange(0, TILE_S)
    o_out = (o_row.to(tl.int64) * G + i_group)[:, None] * S + o_block[None, :]
    m_out = m_row[:, None] & (o_block < S)[None, :]
    tl.store(importance + o_out, tl.sum(b_sum * own[None, None, :], 2), m_out)
    m_next = m_row[:, None] & (o_block + 1 < S)[None, :]
    tl.store(carry + o_out + 1, tl.sum(b_sum * beyond[None, None, :], 2), m_next)


def importance_tiles(key_width: int, dtype: torch.dtype) -> Tiles:
    """Queries and compressed keys of one program; both times K must fit into shared memory.

    16-bit inputs run on tensor cores, where a wide tile halves the reading of q; fp32 multiplies
    element by element, and a small tile keeps registers for it.
    """
    if dtype.itemsize == 4:
        return Tiles(rows=64, keys=32, num_warps=4, num_stages=1)
    if key_width <= 128:
        return Tiles(rows=64, keys=128, num_warps=4, num_stages=2)
    if key_width <= 192:
        return Tiles(rows=128, keys=64, num_warps=8, num_stages=2)
    return Tiles(rows=64, keys=64, num_warps=4, num_stages=2)


@dataclass(frozen=True, slots=True)
class Scores:
    """What is known of some rows before their blocks are chosen."""

    importance: Tensor
    """fp32 [rows, G, S]"""
    carry: Tensor
    """fp32 [rows, G, S], what block j - 1 carries into block j; entry 0 is not written."""
    positions: Tensor
    """int32 [rows], the query's place in its sequence, -1: no query."""
    tokens: Tensor
    """int32 [rows], the query's packed token."""

    @classmethod
    def empty(cls, rows: int, groups: int, blocks: int, device: torch.device) -> "Scores":
        """Memory for so many rows."""
        importance, carry = torch.empty(2, rows, groups, blocks, dtype=torch.float32, device=device)
        positions, tokens = torch.empty(2, rows, dtype=torch.int32, device=device)
        return cls(importance, carry, positions, tokens)

    def first(self, rows: int) -> "Scores":
        """The first rows of it."""
        parts = (self.importance, self.carry, self.positions, self.tokens)
        return Scores(*(part[:rows] for part in parts))


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    config: NsaConfig,
    scale: float,
    cu_keys: Tensor | None = None,
) -> Tensor:
    """Chosen selection blocks, int32 [T, G, n], ascending and padded with -1.

    cu_keys is compressed_cu_seqlens of the sequences, where the caller has it already.

    Source:
        arXiv 2502.11089, Eq. 8-11; Eq. 9 as overlap, counted in strides.
    """
    num_tokens, _, key_width = q.shape
    num_groups = k_cmp.shape[1]
    block_indices = torch.empty(
        num_tokens, num_groups, config.num_selected_blocks, dtype=torch.int32, device=q.device
    )
    if num_tokens == 0:
        return block_indices
    tiles = importance_tiles(key_width, q.dtype)
    # A multiple of 16, so that rows are read in whole vectors.
    num_blocks = triton.cdiv(triton.cdiv(num_tokens, config.selection_block_size), 16) * 16
    total = num_tiles(num_tokens, cu_seqlens.shape[0] - 1, tiles.rows)
    # Importances of a part of the queries at a time: those of all would not fit at long contexts.
    chunk = max(1, min(total, _BUFFER_BYTES // (8 * tiles.rows * num_groups * num_blocks)))
    scores = Scores.empty(chunk * tiles.rows, num_groups, num_blocks, q.device)
    if cu_keys is None:
        cu_keys = compressed_cu_seqlens(cu_seqlens, config)
    offsets = (cu_seqlens, cu_keys)
    for first in range(0, total, chunk):
        count = min(chunk, total - first)
        part = scores.first(count * tiles.rows)
        _score(q, k_cmp, lse, offsets, part, config, scale, tiles, first, count)
        top_blocks(
            part.importance,
            part.positions,
            part.tokens,
            block_indices,
            config,
            carry=part.carry,
        )
    return block_indices


def _score(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    offsets: tuple[Tensor, Tensor],
    scores: Scores,
    config: NsaConfig,
    scale: float,
    tiles: Tiles,
    first: int,
    count: int,
) -> None:
    """Fill `scores` for `count` tiles of queries from the first-th on; `offsets` are cu_seqlens of
    the tokens and of the compressed keys."""
    _, num_heads, key_width = q.shape
    _, num_groups, num_blocks = scores.importance.shape
    strides = triton.next_power_of_2(config.selection_block_size // config.compression_stride)
    tile_blocks = max(1, tiles.keys // strides)
    (q_descriptor,) = descriptors(tiles.rows, q)
    options = {} if q_descriptor is None else register_limit(q.device, _COPIED_REGISTERS)
    span_importance_kernel[(triton.cdiv(num_blocks, tile_blocks), count, num_groups)](
        q,
        q_descriptor,
        k_cmp,
        lse,
        *offsets,
        scores.importance,
        scores.carry,
        scores.positions,
        scores.tokens,
        scale * LOG2_E,
        first,
        offsets[0].shape[0] - 1,
        num_groups,
        num_blocks,
        R=num_heads // num_groups,
        **key_widths(key_width),
        COMPRESSION_BLOCK=config.compression_block_size,
        STRIDE=config.compression_stride,
        SELECTION_BLOCK=config.selection_block_size,
        CHOSEN=config.num_selected_blocks,
        TILE_Q=tiles.rows,
        TILE_S=tile_blocks,
        STRIDES_PADDED=strides,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **options,
    )
