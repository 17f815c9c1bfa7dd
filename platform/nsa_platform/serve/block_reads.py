"""Which blocks of its context each generated token was made from, for requests that ask."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_platform.serve.request import BlockRead, Request
from nsa_platform.serve.scheduler import Step


class BlockReads:
    """Keeps what the layers selected for the last token of a request until it is told."""

    def __init__(self, block_size: int | None) -> None:
        """block_size: tokens of a selection block; None for full attention, which selects none."""
        self.block_size = block_size
        self._selected: dict[str, Tensor] = {}

    @property
    def known_ids(self) -> frozenset[str]:
        """Requests for which something is kept."""
        return frozenset(self._selected)

    def is_wanted(self, step: Step) -> bool:
        """Whether anybody asked for what this step selects."""
        return any(chunk.is_last and chunk.request.params.selected_blocks for chunk in step.chunks)

    def add(self, selected: Sequence[Tensor], step: Step) -> None:
        """Take the selected blocks of a step's tokens, int32 [T, G, n] of each layer."""
        end = 0
        for chunk in step.chunks:
            end += chunk.num_tokens
            if chunk.is_last and chunk.request.params.selected_blocks:
                rows = [blocks[end - 1] for blocks in selected]
                self._selected[chunk.request.request_id] = torch.stack(rows)

    def take(self, request: Request) -> tuple[BlockRead, ...] | None:
        """What the newest token was made from, in the order of the context; neighbours that were
        read alike are one. None if it was not asked for. Waits for the device."""
        blocks = self._selected.pop(request.request_id, None)
        if blocks is None or self.block_size is None:
            return None
        num_readers = blocks.shape[0] * blocks.shape[1]
        counts = Counter(blocks.flatten().tolist())
        reads: list[BlockRead] = []
        for block in sorted(counts.keys() - {-1}):
            start, share = block * self.block_size, counts[block] / num_readers
            end = min(start + self.block_size, request.num_tokens)
            if reads and reads[-1].end == start and reads[-1].share == share:
                start = reads.pop().start
            reads.append(BlockRead(start, end, share))
        return tuple(reads)

    def forget(self, request: Request) -> None:
        """Drop what is kept for a request that has ended."""
        self._selected.pop(request.request_id, None)
