"""Which sequence a tile, a block or a token of a packed batch belongs to, without a host sync.

A tile never crosses a sequence. Sequence b owns the tiles from `cu_seqlens[b] // tile + b` on: each
sequence gets as many as it needs (sometimes one more, which lies past its end), the numbers grow
with b, and `total // tile + B` bounds them all. So the map is a formula instead of a table, and the
grid of a kernel is known from shapes alone.
"""

import torch
from torch import Tensor


def num_tiles(num_rows: int, num_sequences: int, tile: int) -> int:
    """Tiles of `tile` rows that cover every packing of num_rows rows into num_sequences."""
    return num_rows // tile + num_sequences


def first_tiles(cu_seqlens: Tensor, tile: int) -> Tensor:
    """The number of each sequence's first tile; int32 [B], on the device of cu_seqlens."""
    starts = cu_seqlens[:-1]
    order = torch.arange(starts.numel(), device=starts.device, dtype=torch.int32)
    return starts // tile + order


def token_sequences(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The sequence of every packed token; int64 [T], on the device of cu_seqlens."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], tokens, right=True)
