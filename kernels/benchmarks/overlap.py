"""How many blocks neighbouring tokens share: measured on any choice of blocks.

    python kernels/benchmarks/overlap.py blocks.npz

The file holds arrays [T, G, n] of block numbers, one sequence each, -1 where there is none: what
`select_blocks` returned in a trained model, say. What is printed sets the benchmark's `Sharing`.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nsa_kernels import NsaConfig

SPANS = (2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Overlap:
    """What neighbouring tokens share, over the tokens that had a choice to make."""

    kept: float
    """Share of a token's free blocks that the token before it reads too."""
    union: dict[int, float]
    """For each number of neighbouring tokens: distinct blocks that they read, divided by n."""
    distance: list[float]
    """Quartiles of how far back a free block lies, as a share of the blocks of the past."""

    def __str__(self) -> str:
        union = ", ".join(f"{span}: {size:.2f}" for span, size in self.union.items())
        near = ", ".join(f"{share:.2f}" for share in self.distance)
        return f"kept {self.kept:.3f}; union / n {union}; distance quartiles {near}"


def measure_overlap(blocks: Tensor, config: NsaConfig, spans: tuple[int, ...] = SPANS) -> Overlap:
    """Overlap in a choice [T, G, n] of one sequence.

    Tokens with no more than n blocks in their past are left out: they read all of them.

    Args:
        spans: numbers of neighbouring tokens whose unions are counted.

    Raises:
        ValueError: another shape, or fewer tokens than the longest span have a choice.
    """
    n, size = config.num_selected_blocks, config.selection_block_size
    if blocks.dim() != 3 or blocks.shape[2] != n:
        raise ValueError(f"blocks must have shape [T, G, n={n}], got {list(blocks.shape)}")
    first = n * size
    chosen = blocks[first:].long()
    if len(chosen) < max(spans):
        raise ValueError(f"blocks of {len(blocks)} tokens: {first + max(spans)} or more are needed")
    own = (torch.arange(first, len(blocks), device=blocks.device) // size)[:, None, None]
    free_past = own + 1 - config.num_local_blocks
    is_free = (chosen >= config.num_initial_blocks) & (chosen < free_past)
    is_kept = torch.zeros_like(is_free[1:])
    for place in range(n):
        is_kept |= chosen[1:] == chosen[:-1, :, place, None]
    distance = ((free_past - chosen).double() / free_past)[is_free]
    # quantile() takes 16 million values at most.
    quartiles = distance[:: max(1, len(distance) // 2**20)].quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=blocks.device)
    )
    return Overlap(
        kept=float((is_kept & is_free[1:]).sum() / is_free[1:].sum()),
        union={span: _union(chosen, span) / n for span in spans},
        distance=quartiles.tolist(),
    )


def _union(chosen: Tensor, span: int) -> float:
    """Mean number of distinct blocks of `span` neighbouring tokens."""
    groups = len(chosen) // span
    rows = chosen[: groups * span].unflatten(0, (groups, span)).transpose(1, 2).flatten(2)
    rows = rows.sort(-1).values
    is_new = torch.ones_like(rows, dtype=torch.bool)
    is_new[..., 1:] = rows[..., 1:] != rows[..., :-1]
    return float((is_new & (rows >= 0)).sum(-1).double().mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("blocks", type=Path, help=".npz with arrays [T, G, n] of block numbers")
    path, config = parser.parse_args().blocks, NsaConfig()
    try:
        with np.load(path) as file:
            for name in file.files:
                print(f"{name}: {measure_overlap(torch.from_numpy(file[name]), config)}")
    except (OSError, ValueError) as error:
        print(f"overlap: {path}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
