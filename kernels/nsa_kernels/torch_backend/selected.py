"""Selected attention: dense tiles under a mask that opens the chosen blocks of each group."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from nsa_kernels.checks import accumulation_dtype
from nsa_kernels.shapes import NsaConfig
from nsa_kernels.torch_backend.runs import Runs, full_runs
from nsa_kernels.torch_backend.tiles import (
    Tile,
    attend_backward,
    attend_forward,
    run_tiles,
)


def _block_biases(
    tile: Tile, runs: Runs, block_indices: Tensor, block_size: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """For the keys of each sequence in the tile, 0 in each query's blocks and -inf elsewhere.

    The tile's own biases already hide a sequence from the queries of the others.
    """
    starts = [*runs.first[tile.rows].unique_consecutive().tolist(), tile.keys.stop]
    longest = max(stop - start for start, stop in pairwise(starts))
    num_blocks = -(-longest // block_size)
    chosen = block_indices[tile.rows].transpose(0, 1).long()  # [G, queries, n]
    # One block more than there are takes the -1 and the blocks beyond the tile's keys.
    chosen = torch.where((chosen < 0) | (chosen > num_blocks), num_blocks, chosen)
    bias = torch.full(
        (*chosen.shape[:2], num_blocks + 1), -torch.inf, dtype=dtype, device=chosen.device
    ).scatter_(2, chosen, 0.0)
    for start, stop in pairwise(starts):
        blocks = -(-(stop - start) // block_size)
        by_key = bias[:, :, :blocks, None].expand(-1, -1, -1, block_size).flatten(2)
        columns = slice(start - tile.keys.start, stop - tile.keys.start)
        yield columns, by_key[:, :, None, : stop - start]


def chosen_tiles(
    block_indices: Tensor, runs: Runs, config: NsaConfig, dtype: torch.dtype
) -> Iterator[Tile]:
    """Tiles in which a query sees the keys of its run that lie in one of its blocks.

    Args:
        block_indices: int32 [rows, G, n], block numbers within the query's sequence, -1 for none.
        runs: full_runs; each starts with its sequence.
    """
    block_size = config.selection_block_size
    for tile in run_tiles(runs, dtype):
        blocks = _block_biases(tile, runs, block_indices, block_size, dtype)
        yield replace(tile, biases=[*tile.biases, *blocks])


def _tiles(
    q: Tensor, block_indices: Tensor, cu_seqlens: Tensor, config: NsaConfig
) -> Iterator[Tile]:
    runs = full_runs(cu_seqlens, q.shape[0])
    return chosen_tiles(block_indices, runs, config, accumulation_dtype(q.dtype))


def selected_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    config: NsaConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out and lse over the tokens of the chosen blocks up to the query."""
    return attend_forward(q, k, v, _tiles(q, block_indices, cu_seqlens, config), scale)


def selected_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    config: NsaConfig,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of selected_forward, the blocks held fixed."""
    tiles = _tiles(q, block_indices, cu_seqlens, config)
    return attend_backward(dout, dlse, q, k, v, out, lse, tiles, scale)
