"""What place_new_tokens (paged_places.py) is told and tells: new tokens, their pages and places."""

from dataclasses import dataclass

from torch import Tensor

from nsa_kernels.new_rows import NewBlocks


@dataclass(frozen=True, slots=True)
class NewTokens:
    """New tokens of B sequences in packed order, and the pages of the sequences."""

    positions: Tensor
    """int32 [T], in their sequences."""
    cu_seqlens: Tensor
    """int32 [B + 1], starts of each sequence's new tokens in T, then T itself."""
    context_lens: Tensor
    """int32 [B], tokens of each sequence with the new ones."""
    page_table: Tensor
    """int32 [B, M], physical page of each logical page; -1 where there is none."""
    window_page_table: Tensor | None
    """int32 [B, M], the same for the pool of the window; None for full attention."""
    shared_lens: Tensor
    """int32 [B], so many first tokens lie in pages of other sequences too."""


@dataclass(frozen=True, slots=True)
class NewPlaces:
    """Rows and angles of new tokens, and of the compression blocks that they complete."""

    token_rows: Tensor
    """int64 [T], row of the caches by page_table; 0, scratch, where the page is shared."""
    window_rows: Tensor | None
    """int64 [T], row of the caches by window_page_table."""
    cos: Tensor
    """[T, K / 2], of the tokens' positions."""
    sin: Tensor
    """[T, K / 2]"""
    blocks: NewBlocks | None
    """A block is new when its last token is; one that starts in a shared page goes to scratch.
    q new tokens of a sequence complete ceil(q / d) blocks at most: there is room for all."""


def most_new_blocks(num_tokens: int, num_sequences: int, stride: int) -> int:
    """Blocks that new tokens complete at most, from shapes alone."""
    return (num_tokens + num_sequences * (stride - 1)) // stride
