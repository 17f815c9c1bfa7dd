"""Rows of a paged batch: new tokens in tiles of one sequence each, located on the device.

Tiles are numbered as in packing.py, so the number of rows is known from shapes alone. A row without
a token (the end of a sequence's last tile, or a tile past it) has position -1.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.packing import num_tiles

_ROWS_PER_PROGRAM = 64
# Sequences that are asked at once. One number for all: a server compiles one kernel.
_TILE_B = 64


@dataclass(frozen=True, slots=True)
class Rows:
    """Where each row stands, int32 [rows]; `tokens` rows make a tile."""

    sequences: Tensor
    positions: Tensor
    """Position in the sequence, -1 for no token."""
    packed: Tensor
    """The packed new token."""
    tokens: int

    @property
    def num_tiles(self) -> int:
        return self.positions.shape[0] // self.tokens

    def cut(self, first_tile: int, count: int) -> "Rows":
        """The rows of up to `count` tiles."""
        part = slice(first_tile * self.tokens, (first_tile + count) * self.tokens)
        return Rows(self.sequences[part], self.positions[part], self.packed[part], self.tokens)


@triton.jit
def find_new_tokens(
    cu_seqlens, context_lens, num_sequences, i_tile, TOKENS: tl.constexpr, TILE_B: tl.constexpr
):
    """(sequence, first packed token, its position, number of tokens) of a tile of new tokens.

    Tiles of one token are the packed tokens themselves, larger ones are numbered as in packing.py.
    The number is not positive where the tile has no token. All sequences are asked at once: steps
    of a search would each wait for the one before.
    """
    i_sequence = i_tile * 0
    for first in range(1, num_sequences, TILE_B):
        o_sequence = first + tl.arange(0, TILE_B)
        first_tile = tl.load(cu_seqlens + o_sequence, o_sequence < num_sequences, 0)
        if TOKENS > 1:
            first_tile = first_tile // TOKENS + o_sequence
        is_before = (o_sequence < num_sequences) & (first_tile <= i_tile)
        i_sequence += tl.sum(is_before.to(tl.int32), 0)
    start = tl.load(cu_seqlens + i_sequence)
    length = tl.load(cu_seqlens + i_sequence + 1) - start
    context = tl.load(context_lens + i_sequence)
    offset = i_tile - start
    if TOKENS > 1:
        offset = (i_tile - (start // TOKENS + i_sequence)) * TOKENS
    count = tl.minimum(length - offset, TOKENS)
    return i_sequence, start + offset, context - length + offset, count


@triton.jit(do_not_specialize=["num_rows", "B"])
def locate_rows_kernel(
    cu_seqlens,
    context_lens,
    row_sequences,
    row_positions,
    row_tokens,
    num_rows,
    B,
    TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_B: tl.constexpr,
):
    """Write sequence, position and packed token of every row of tiles of TOKENS rows."""
    o_row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    m_row = o_row < num_rows
    o_tile = o_row // TOKENS
    # The last sequence whose first tile, cu_seqlens[b] // TOKENS + b, is not after the row's.
    sequence = tl.zeros([TILE_ROWS], tl.int32)
    for first in range(1, B, TILE_B):
        o_sequence = first + tl.arange(0, TILE_B)
        start = tl.load(cu_seqlens + o_sequence, o_sequence < B, 0)
        first_tile = tl.where(o_sequence < B, start // TOKENS + o_sequence, 0x7FFFFFFF)
        sequence += tl.sum((first_tile[None, :] <= o_tile[:, None]).to(tl.int32), 1)
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - start
    offset = o_row - (start // TOKENS + sequence) * TOKENS
    position = tl.load(context_lens + sequence) - length + offset
    tl.store(row_sequences + o_row, sequence, m_row)
    tl.store(row_positions + o_row, tl.where(offset < length, position, -1), m_row)
    tl.store(row_tokens + o_row, start + offset, m_row)


def locate_rows(
    cu_seqlens: Tensor, context_lens: Tensor, num_tokens: int, tokens_per_tile: int
) -> Rows:
    """Rows of all new tokens, in tiles of tokens_per_tile."""
    num_sequences = context_lens.shape[0]
    num_rows = num_tiles(num_tokens, num_sequences, tokens_per_tile) * tokens_per_tile
    sequences = torch.empty(num_rows, dtype=torch.int32, device=cu_seqlens.device)
    rows = Rows(
        sequences, torch.empty_like(sequences), torch.empty_like(sequences), tokens_per_tile
    )
    locate_rows_kernel[(triton.cdiv(num_rows, _ROWS_PER_PROGRAM),)](
        cu_seqlens,
        context_lens,
        rows.sequences,
        rows.positions,
        rows.packed,
        num_rows,
        num_sequences,
        TOKENS=tokens_per_tile,
        TILE_ROWS=_ROWS_PER_PROGRAM,
        TILE_B=_TILE_B,
    )
    return rows
