"""The sizes of Native Sparse Attention, and how many compressed blocks they make."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class NsaConfig:
    """Sizes in tokens and blocks, in the paper's words (arXiv 2502.11089, section 4.1 defaults).

    Raises:
        ValueError: a size is out of range, or two sizes do not fit together.
    """

    compression_block_size: int = 32
    """l. Tokens folded into one compressed key."""
    compression_stride: int = 16
    """d. Step between the starts of compression blocks; divides l and l'."""
    selection_block_size: int = 64
    """l'. Tokens of a selection block; at least l."""
    num_selected_blocks: int = 16
    """n. Selection blocks that a query reads, the forced ones included."""
    num_initial_blocks: int = 1
    """First blocks of a sequence that are always among the n."""
    num_local_blocks: int = 2
    """Last blocks that are always among the n; the query's own is one of them."""
    window_size: int = 512
    """w. The sliding branch sees the last w tokens, the query's own included."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
        l, d, b = self.compression_block_size, self.compression_stride, self.selection_block_size
        if l % d:
            raise ValueError(
                f"compression_stride={d} must divide compression_block_size={l} (d | l, Eq. 9)"
            )
        if b % d:
            raise ValueError(
                f"compression_stride={d} must divide selection_block_size={b} (d | l', Eq. 9)"
            )
        if l > b:
            raise ValueError(
                f"compression_block_size={l} must not exceed selection_block_size={b} "
                f"(l <= l', Eq. 9)"
            )
        forced = self.num_initial_blocks + self.num_local_blocks
        if forced > self.num_selected_blocks:
            raise ValueError(
                f"num_initial_blocks + num_local_blocks = {forced} must fit into "
                f"num_selected_blocks={self.num_selected_blocks}"
            )

    def sees_all(self, num_tokens: int) -> bool:
        """Whether n blocks hold every block of a sequence of num_tokens: selection is attention."""
        return num_tokens <= self.num_selected_blocks * self.selection_block_size

    @property
    def sizes(self) -> list[int]:
        """The fields in order, as the registered ops carry them; NsaConfig(*sizes) undoes it."""
        # Not astuple: below Python 3.12 it copies deeply, which ends a compiled graph.
        return [getattr(self, name) for name in _LEAST]


_LEAST = {
    "compression_block_size": 1,
    "compression_stride": 1,
    "selection_block_size": 1,
    "num_selected_blocks": 1,
    "num_initial_blocks": 0,
    "num_local_blocks": 1,
    "window_size": 1,
}


def num_compressed_blocks(num_tokens: int, config: NsaConfig) -> int:
    """Complete compression blocks in a sequence of num_tokens tokens.

    Zero below l tokens, else (num_tokens - l) // d + 1, as the text at Eq. 8 counts them; the text
    under Eq. 7 leaves the one out.
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens={num_tokens} must not be negative")
    if num_tokens < config.compression_block_size:
        return 0
    return (num_tokens - config.compression_block_size) // config.compression_stride + 1


def compressed_cu_seqlens(cu_seqlens: Tensor, config: NsaConfig) -> Tensor:
    """Where each sequence's compressed blocks start in the packed order, then their total.

    Args:
        cu_seqlens: int32 [B+1], where each sequence's tokens start, then their total.

    Returns:
        int32 [B+1] on the same device, computed there without a host sync.
    """
    stride = config.compression_stride
    overhang = config.compression_block_size - stride
    counts = (cu_seqlens.diff() - overhang).clamp(min=0).div(stride, rounding_mode="floor")
    offsets = counts.cumsum(0, dtype=torch.int32)
    return torch.nn.functional.pad(offsets, (1, 0))
