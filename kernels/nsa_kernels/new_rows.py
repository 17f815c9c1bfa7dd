"""What the ops of paged_writes.py are told: new rows and blocks, their places, and phi."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class NewRows:
    """Keys and values of new tokens for one branch, and where they go."""

    keys: Tensor
    """[T, G, K], not rotated yet; rows may lie apart."""
    values: Tensor
    """[T, G, V]"""
    k_cache: Tensor
    """[P, page, G, K], like the keys or fp8."""
    v_cache: Tensor
    """[P, page, G, V], likewise."""
    rows: Tensor
    """int64 [T], row of the caches for each token; 0 for none."""
    is_rotated: bool = True
    """Whether keys are rotated on their way."""


@dataclass(frozen=True, slots=True)
class Phi:
    """The map that folds a block of l rows into one, with its own parameters for each group.

    mean: nothing is given. linear: the block, with `position` added, times `fold`. mlp: the mean
    plus silu(that) times `correct`.
    """

    position: Tensor | None = None
    """[G, l, W]"""
    fold: Tensor | None = None
    """[G, l * W, W]"""
    correct: Tensor | None = None
    """[G, W, W]"""

    def __post_init__(self) -> None:
        """Raises ValueError for parts that make no kind."""
        is_mean = self.fold is None
        if is_mean != (self.position is None) or (is_mean and self.correct is not None):
            raise ValueError(
                "phi: give nothing (mean), position and fold (linear), or correct as well (mlp)"
            )


@dataclass(frozen=True, slots=True)
class NewBlocks:
    """Blocks that new tokens complete, E of them at most, and where they go."""

    tail_rows: Tensor
    """int64 [E, l], rows of the tail caches with the tokens of each block."""
    rows: Tensor
    """int64 [E], row of the compressed caches for each block; 0 for one that is none."""
    cos: Tensor
    """fp32 [E, K / 2], of the blocks' starts."""
    sin: Tensor
    """fp32 [E, K / 2]"""
    is_rotated: bool = True
    """Whether compressed keys are rotated on their way."""


def fold_blocks(blocks: Tensor, phi: Phi) -> Tensor:
    """phi of single blocks [G, C, l, W], as [C, G, W]. Differentiable (Eq. 7)."""
    if phi.fold is None or phi.position is None:
        return blocks.mean(2).transpose(0, 1)
    placed = blocks + phi.position[:, None].to(blocks.dtype)
    folded = torch.bmm(placed.flatten(2), phi.fold)
    if phi.correct is not None:
        correction = torch.bmm(torch.nn.functional.silu(folded), phi.correct)
        folded = blocks.mean(2).to(correction.dtype) + correction
    return folded.transpose(0, 1)
