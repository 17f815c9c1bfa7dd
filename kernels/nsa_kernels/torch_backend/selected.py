"""Selected attention: dense tiles under a mask that opens the chosen blocks of each group."""

from collections.abc import Iterator

import torch
from torch import Tensor

from nsa_kernels.checks import accumulation_dtype
from nsa_kernels.shapes import NsaConfig
from nsa_kernels.torch_backend.runs import Runs, full_runs
from nsa_kernels.torch_backend.tiles import (
    Tile,
    as_bias,
    attend_backward,
    attend_forward,
    tile_bounds,
    visible_keys,
)


def chosen_tiles(
    block_indices: Tensor, runs: Runs, key_blocks: Tensor, dtype: torch.dtype
) -> Iterator[Tile]:
    """Tiles in which a query sees the keys of its run that lie in one of its blocks.

    Args:
        block_indices: int32 [rows, G, n], block numbers within the query's sequence, -1 for none.
        key_blocks: int64 [keys], the block number of each packed key within its own sequence.
    """
    for rows, keys in tile_bounds(runs):
        blocks = key_blocks[keys]
        num_blocks = int(blocks.max()) + 1 if blocks.numel() else 0
        chosen = block_indices[rows].transpose(0, 1).long()
        # One column more than there are blocks takes the -1 and the blocks beyond the tile's keys.
        chosen = torch.where((chosen < 0) | (chosen > num_blocks), num_blocks, chosen)
        is_chosen = torch.zeros(
            *chosen.shape[:2], num_blocks + 1, dtype=torch.bool, device=chosen.device
        ).scatter_(2, chosen, True)
        visible = is_chosen[:, :, blocks].logical_and_(visible_keys(runs, rows, keys))
        yield Tile(rows, keys, as_bias(visible, dtype).unsqueeze(2))


def _tiles(
    q: Tensor, block_indices: Tensor, cu_seqlens: Tensor, config: NsaConfig
) -> Iterator[Tile]:
    runs = full_runs(cu_seqlens, q.shape[0])
    key_blocks = (runs.end - 1 - runs.first) // config.selection_block_size
    return chosen_tiles(block_indices, runs, key_blocks, accumulation_dtype(q.dtype))


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
