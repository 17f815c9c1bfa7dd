"""Which tokens chose each selection block: the choice read from the keys' side.

Tokens are taken in ranges, so that what the passes by blocks leave for each choice of a range fits
into a bounded buffer. Inside a range every (group, block) has a list of the tokens that chose it,
ascending, all from one stable sort: no atomics, so the order never changes. Long lists
(block 0 is chosen by every token) are cut into chunks, the units of work, so that no program runs
much longer than the rest. Nothing here waits for the device: sizes are bounds from shapes alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_kernels.packing import first_tiles, num_tiles, token_sequences


@dataclass(frozen=True, slots=True)
class ChoiceLists:
    """Lists by (range, group, block); list i of a range = group * num_blocks + block."""

    span: int
    """Tokens of a range; range r covers packed tokens [r * span, (r + 1) * span)."""
    num_blocks: int
    """Blocks of the packed batch; sequence b's first is packing.first_tiles(cu_seqlens, l')[b]."""
    tokens: Tensor
    """int32 [T * G * n], packed tokens of all lists; past the last list they mean nothing."""
    places: Tensor
    """int32 [T, G, n], where in the lists of its range each choice lies; -1 if it is in none."""
    starts: Tensor
    """int64 [ranges, lists + 1], where each list starts in tokens."""
    chunk_lists: Tensor
    """int32 [ranges, max_chunks], the list of each chunk; past the last chunk `lists`."""
    chunk_starts: Tensor
    """int32 [ranges, lists + 1], each list's first chunk; an empty list has none."""
    slots: Tensor
    """int32 [ranges, lists], first place of a list of several chunks among partial sums; or -1."""
    max_slots: int
    """Bound on the places that partial sums of a range need."""

    @property
    def num_ranges(self) -> int:
        return self.starts.shape[0]

    @property
    def num_lists(self) -> int:
        return self.slots.shape[1]


def list_choices(
    block_indices: Tensor, cu_seqlens: Tensor, selection_block: int, span: int, chunk_tokens: int
) -> ChoiceLists:
    """Lists of block_indices int32 [T, G, n]; chunk_tokens bounds the tokens of a chunk.

    Blocks that a token cannot see (after its own) are left out like -1: their keys get nothing.
    """
    num_tokens, num_groups, num_choices = block_indices.shape
    device = block_indices.device
    num_blocks = num_tiles(num_tokens, cu_seqlens.numel() - 1, selection_block)
    num_lists = num_groups * num_blocks
    num_ranges = max(1, -(-num_tokens // span))

    sequences = token_sequences(cu_seqlens, num_tokens)
    tokens = torch.arange(num_tokens, device=device, dtype=torch.int32)
    last_blocks = ((tokens - cu_seqlens[sequences]) // selection_block)[:, None, None]
    ranges = tokens // span
    bases = ranges * num_lists + first_tiles(cu_seqlens, selection_block)[sequences]
    group_lists = num_blocks * torch.arange(num_groups, device=device, dtype=torch.int32)
    is_seen = (block_indices >= 0) & (block_indices <= last_blocks)
    lists = block_indices + (bases[:, None] + group_lists)[:, :, None]
    lists = torch.where(is_seen, lists, num_ranges * num_lists).flatten()
    lists, choices = lists.sort(stable=True)
    numbers = torch.arange(num_ranges * num_lists + 1, device=device, dtype=torch.int32)
    ends = torch.searchsorted(lists, numbers)
    starts = torch.cat([ends[:-1].view(num_ranges, -1), ends[num_lists::num_lists, None]], 1)

    places = torch.empty_like(choices, dtype=torch.int32)
    places[choices] = torch.arange(choices.numel(), device=device, dtype=torch.int32)
    places = places.view_as(block_indices) - starts[ranges, 0].to(torch.int32)[:, None, None]

    chunks = (starts.diff() + chunk_tokens - 1) // chunk_tokens
    ends = chunks.cumsum(1)
    range_choices = min(span, num_tokens) * num_groups * num_choices
    max_chunks = range_choices // chunk_tokens + min(num_lists, range_choices)
    chunk_numbers = torch.arange(max_chunks, device=device).expand(num_ranges, -1).contiguous()
    parts = torch.where(chunks > 1, chunks, 0)
    slots = torch.where(chunks > 1, parts.cumsum(1) - parts, -1)
    return ChoiceLists(
        span=span,
        num_blocks=num_blocks,
        tokens=(choices // (num_groups * num_choices)).to(torch.int32),
        places=torch.where(is_seen, places, -1),
        starts=starts,
        chunk_lists=torch.searchsorted(ends, chunk_numbers, right=True, out_int32=True),
        chunk_starts=torch.nn.functional.pad(ends, (1, 0)).to(torch.int32),
        slots=slots.to(torch.int32),
        # c choices make fewer than c / chunk_tokens + 1 chunks; several only if c > chunk_tokens.
        max_slots=2 * range_choices // chunk_tokens,
    )
