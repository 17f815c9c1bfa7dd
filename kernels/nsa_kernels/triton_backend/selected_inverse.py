"""Which tokens chose each selection block: the choice read from the keys' side.

Every (group, block) has a list of the packed tokens that chose it. Lists lie one after another,
group by group, tokens ascending inside, all from one stable sort: no atomics, so the order never
changes. Long lists (block 0 is chosen by every token of its sequence) are cut into chunks, the
units of work of the dk, dv pass, so that no program runs much longer than the rest. Nothing here
waits for the device: sizes are bounds from shapes alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_kernels.packing import first_tiles, num_tiles, token_sequences


@dataclass(frozen=True, slots=True)
class InverseChoice:
    """Lists of tokens by (group, block), and their chunks; list i = group * num_blocks + block."""

    num_blocks: int
    """Blocks of the packed batch; sequence b's first is packing.first_tiles(cu_seqlens, l')[b]."""
    tokens: Tensor
    """int32 [T * G * n], packed tokens of all lists; past the last list they mean nothing."""
    list_starts: Tensor
    """int64 [lists + 1], where each list starts in tokens."""
    chunk_lists: Tensor
    """int32 [max_chunks], the list of each chunk; past the last chunk the number of lists."""
    chunk_starts: Tensor
    """int32 [lists + 1], each list's first chunk."""
    slots: Tensor
    """int32 [lists], first place of a list of several chunks among the partial sums; else -1."""
    max_slots: int
    """Bound on the places that partial sums need."""


def invert_choice(
    block_indices: Tensor, cu_seqlens: Tensor, selection_block: int, chunk_tokens: int
) -> InverseChoice:
    """Invert block_indices int32 [T, G, n]; chunk_tokens bounds the tokens of a chunk.

    Blocks that a token cannot see (after its own) are left out like -1: their keys get nothing.
    """
    num_tokens, num_groups, num_choices = block_indices.shape
    device = block_indices.device
    num_blocks = num_tiles(num_tokens, cu_seqlens.numel() - 1, selection_block)
    num_lists = num_groups * num_blocks

    sequences = token_sequences(cu_seqlens, num_tokens)
    positions = torch.arange(num_tokens, device=device, dtype=torch.int32) - cu_seqlens[sequences]
    last_blocks = (positions // selection_block)[:, None, None]
    group_lists = num_blocks * torch.arange(num_groups, device=device, dtype=torch.int32)
    bases = first_tiles(cu_seqlens, selection_block)[sequences][:, None] + group_lists  # [T, G]
    is_seen = (block_indices >= 0) & (block_indices <= last_blocks)
    lists = torch.where(is_seen, block_indices + bases[:, :, None], num_lists).flatten()
    lists, order = lists.sort(stable=True)
    tokens = (order // (num_groups * num_choices)).to(torch.int32)
    numbers = torch.arange(num_lists + 1, device=device, dtype=torch.int32)
    list_starts = torch.searchsorted(lists, numbers)

    counts = list_starts.diff()
    chunks = ((counts + chunk_tokens - 1) // chunk_tokens).clamp(min=1)
    ends = chunks.cumsum(0)
    max_chunks = lists.numel() // chunk_tokens + num_lists
    chunk_numbers = torch.arange(max_chunks, device=device)
    chunk_lists = torch.searchsorted(ends, chunk_numbers, right=True, out_int32=True)
    parts = torch.where(chunks > 1, chunks, 0)
    slots = torch.where(chunks > 1, parts.cumsum(0) - parts, -1)
    return InverseChoice(
        num_blocks=num_blocks,
        tokens=tokens,
        list_starts=list_starts,
        chunk_lists=chunk_lists,
        chunk_starts=torch.nn.functional.pad(ends, (1, 0)).to(torch.int32),
        slots=slots.to(torch.int32),
        # c tokens make fewer than c / chunk_tokens + 1 chunks; several only if c > chunk_tokens.
        max_slots=2 * lists.numel() // chunk_tokens,
    )
