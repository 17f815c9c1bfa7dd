"""What a forward pass needs beside the token ids: packed lengths, pages of a cache, or a policy.

Letters are those of kernels/README.md: T packed tokens, B sequences, M logical pages of a sequence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from nsa_kernels import NewTokens
from nsa_platform.model.cache import LayerCache
from nsa_platform.model.partition import WHOLE, Partition
from nsa_platform.model.probe import Probe


@dataclass(frozen=True, slots=True)
class PackedInputs:
    """Whole sequences laid end to end; nothing is kept for later (training, evaluation)."""

    positions: Tensor
    """int32 [T], counted from 0 in each sequence; where workers share tokens, of this one's."""
    cu_seqlens: Tensor
    """int32 [B + 1], starts of the sequences in T, then T itself: of the tokens of all workers."""
    probe: Probe | None = None
    """Collects the health of the sparse attention when given."""
    partition: Partition = WHOLE
    """How workers share the pass."""

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        probe: Probe | None = None,
    ) -> Self:
        """Inputs of sequences with these lengths in tokens, in this order."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths={list(lengths)} must be one or more positive numbers")
        ends = torch.tensor([0, *lengths]).cumsum(0)
        positions = torch.cat([torch.arange(length) for length in lengths])
        return cls(positions.int().to(device), ends.int().to(device), probe)


@dataclass(slots=True)
class Observed:
    """What the NSA layers, one after the other, did with the new tokens."""

    selected: list[Tensor] = field(default_factory=list)
    """Selected blocks, int32 [T, G, n] of each layer."""
    gate_means: list[Tensor] = field(default_factory=list)
    """Gates of the branches cmp, slc, win, a mean over tokens and heads, fp32 [3] of each layer."""


@dataclass(frozen=True, slots=True)
class PagedInputs(NewTokens):
    """New tokens of sequences whose earlier tokens lie in paged caches (prefill and decoding).

    Rows of the selection pool are not written for tokens within shared_lens: a whole number of
    pages; 0 where nothing is shared.
    """

    caches: list[LayerCache]
    """One cache for each layer. The forward pass writes the new tokens into them."""
    observed: Observed | None = None
    """Gets what the layers do; None: nobody wants to know."""


Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention of one layer by somebody else: the layer's index, queries [T, H, K], keys [T, G, K] and
values [T, G, V] of the new tokens, the first two not yet rotated -> out [T, H, V]."""


@dataclass(frozen=True, slots=True)
class PolicyInputs:
    """New tokens of one sequence whose keys and values somebody else keeps, and reads as it likes.

    For models with full attention: training-free policies over their keys and values.
    """

    attend: Attend
