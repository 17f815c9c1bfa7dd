"""Which blocks the tokens of a tile chose together, and which of the tokens chose each.

Neighbouring tokens choose much the same blocks, so a tile of them walks the union of their choices
and loads each block once; a mask keeps every token to its own choice.
"""

# Jitted functions and their launches have no types that a checker knows.
# pyright: reportArgumentType=false, reportCallIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.packing import num_tiles
from nsa_kernels.triton_backend.tiles import find_tile


@dataclass(frozen=True, slots=True)
class ChoiceUnion:
    """The blocks of every tile of `tokens` tokens and group; tiles are those of packing.py."""

    tokens: int
    entries: Tensor
    """int32 [tiles, G, tokens * n]: a block within the sequence times 2^tokens, plus bit i if the
    tile's token i chose it. First those that end before the tile's first token, then the others, as
    they are named; behind them nothing."""
    counts: Tensor
    """int32 [tiles, G, 2], blocks that end before the tile's first token, and all blocks."""


def unite_choices(
    block_indices: Tensor, cu_seqlens: Tensor, selection_block: int, tokens: int
) -> ChoiceUnion:
    """The unions of block_indices int32 [T, G, n], any order, -1 or unseen for none."""
    num_tokens, num_groups, num_choices = block_indices.shape
    num_sequences = cu_seqlens.numel() - 1
    tiles = num_tiles(num_tokens, num_sequences, tokens)
    places = tokens * num_choices
    device = block_indices.device
    entries = torch.empty(tiles, num_groups, places, dtype=torch.int32, device=device)
    counts = torch.empty(tiles, num_groups, 2, dtype=torch.int32, device=device)
    unite_choices_kernel[(tiles, num_groups)](
        block_indices, cu_seqlens, entries, counts, num_sequences, num_groups,
        N=num_choices,
        TOKENS=tokens,
        SELECTION_BLOCK=selection_block,
        PLACES_PADDED=triton.next_power_of_2(places),
        num_warps=4 if places <= 64 else 8,
    )  # fmt: skip
    return ChoiceUnion(tokens, entries, counts)


@triton.jit(do_not_specialize=["num_sequences"])
def unite_choices_kernel(
    block_indices,
    cu_seqlens,
    entries,
    counts,
    num_sequences,
    G,
    N: tl.constexpr,
    TOKENS: tl.constexpr,
    SELECTION_BLOCK: tl.constexpr,
    PLACES_PADDED: tl.constexpr,
):
    """Entries and counts of one tile and group: all places compared with all."""
    i_tile = tl.program_id(0)
    i_group = tl.program_id(1)
    _, start, length, t_first = find_tile(cu_seqlens, num_sequences, i_tile, TOKENS)
    o_place = tl.arange(0, PLACES_PADDED)
    o_token = t_first + o_place // N
    m_place = (o_place < TOKENS * N) & (o_token < length)
    p_choice = block_indices + ((start + t_first).to(tl.int64) * G + i_group) * N
    o_choice = o_place // N * (G * N) + o_place % N
    b_block = tl.load(p_choice + o_choice, mask=m_place, other=-1)
    m_seen = (b_block >= 0) & (b_block <= o_token // SELECTION_BLOCK)
    b_block = tl.where(m_seen, b_block, -1)
    # The same along the other axis: read again rather than moved between threads.
    o_other = tl.arange(0, PLACES_PADDED)
    o_other_token = t_first + o_other // N
    m_other = (o_other < TOKENS * N) & (o_other_token < length)
    b_other = tl.load(p_choice + o_other // N * (G * N) + o_other % N, mask=m_other, other=-1)
    b_other = tl.where(b_other <= o_other_token // SELECTION_BLOCK, b_other, -1)

    # One sum over the other places tells both: which tokens chose the block (the lower bits), and
    # whether it was named before (the higher ones).
    is_same = b_block[:, None] == b_other[None, :]
    bit = (1 << o_other // N)[None, :]
    found = tl.where(o_other[None, :] < o_place[:, None], bit + (1 << 2 * TOKENS), bit)
    b_found = tl.sum(tl.where(is_same, found, 0), 1)
    is_first = m_seen & (b_found < 1 << 2 * TOKENS)
    is_open = (is_first & (b_block < t_first // SELECTION_BLOCK)).to(tl.int32)
    is_closed = is_first.to(tl.int32) - is_open
    num_open = tl.sum(is_open, 0)
    place = tl.where(is_open > 0, tl.cumsum(is_open, 0), num_open + tl.cumsum(is_closed, 0)) - 1
    row = (i_tile.to(tl.int64) * G + i_group) * (TOKENS * N)
    tl.store(entries + row + place, (b_block << TOKENS) + b_found, mask=is_first)
    p_count = counts + (i_tile.to(tl.int64) * G + i_group) * 2
    tl.store(p_count, num_open)
    tl.store(p_count + 1, num_open + tl.sum(is_closed, 0))
