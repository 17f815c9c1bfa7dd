"""Which run of keys each query can see: all that tells the three causal patterns apart.

In the packed order a query sees keys [first, end) of the packed keys, whatever the pattern (full,
sliding, compressed). Both bounds rise with the query, so a tile of consecutive queries reads one
contiguous run of keys and sequence boundaries need no loop.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_kernels.shapes import NsaConfig, compressed_cu_seqlens


@dataclass(frozen=True, slots=True)
class Runs:
    """Query row r sees the packed keys [first[r], end[r]); the run may be empty."""

    first: Tensor
    """int64 [rows], non-decreasing."""
    end: Tensor
    """int64 [rows], non-decreasing."""


def sequence_starts(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """int64 [T]: the packed index of the first token of each token's sequence."""
    offsets = cu_seqlens.long()
    return torch.repeat_interleave(offsets[:-1], offsets.diff(), output_size=num_tokens)


def full_runs(cu_seqlens: Tensor, num_tokens: int) -> Runs:
    """Every token of the sequence up to the query's own."""
    tokens = torch.arange(1, num_tokens + 1, device=cu_seqlens.device)
    return Runs(first=sequence_starts(cu_seqlens, num_tokens), end=tokens)


def sliding_runs(cu_seqlens: Tensor, num_tokens: int, config: NsaConfig) -> Runs:
    """The last window_size tokens of the sequence, the query's own included."""
    full = full_runs(cu_seqlens, num_tokens)
    return Runs(first=torch.maximum(full.first, full.end - config.window_size), end=full.end)


def num_visible_blocks(positions: Tensor, config: NsaConfig) -> Tensor:
    """Compressed blocks complete at each position: block i once i*d + l - 1 <= position."""
    past_first = positions + 1 - config.compression_block_size
    blocks = past_first.div(config.compression_stride, rounding_mode="floor") + 1
    return blocks.clamp_(min=0)


def compressed_runs(cu_seqlens: Tensor, num_tokens: int, config: NsaConfig) -> Runs:
    """The compressed blocks of the sequence that are complete at the query's position."""
    starts = sequence_starts(cu_seqlens, num_tokens)
    positions = torch.arange(num_tokens, device=cu_seqlens.device) - starts
    offsets = compressed_cu_seqlens(cu_seqlens, config).long()
    lengths = cu_seqlens.long().diff()
    first = torch.repeat_interleave(offsets[:-1], lengths, output_size=num_tokens)
    return Runs(first=first, end=first + num_visible_blocks(positions, config))
