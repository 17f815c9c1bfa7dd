"""Attention over tiles of queries: each tile meets one run of keys under an additive mask.

Query heads of a group share its keys without repeating them: a tile's rows are (query, head of the
group) pairs, one batched matrix product per tile with the groups as the batch. The backward pass
recomputes the probabilities from lse, tile by tile, as flash attention does.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_kernels.checks import accumulation_dtype
from nsa_kernels.torch_backend.runs import Runs

TILE_QUERIES = 128
"""Queries of a tile: enough work per Python step, few enough that a tile's logits stay in cache."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries `rows` against keys `keys`, both half-open runs of the packed order."""

    rows: slice
    keys: slice
    bias: Tensor
    """0 where a query sees a key, else -inf; broadcasts to [G, queries, R, keys]."""


def visible_keys(runs: Runs, rows: slice, keys: slice) -> Tensor:
    """bool [queries, keys]: whether each query of the tile sees each key of the run."""
    key = torch.arange(keys.start, keys.stop, device=runs.end.device)
    return (key >= runs.first[rows, None]) & (key < runs.end[rows, None])


def as_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf elsewhere."""
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill_(visible.logical_not(), -torch.inf)


def tile_bounds(runs: Runs, tile_queries: int = TILE_QUERIES) -> Iterator[tuple[slice, slice]]:
    """Cut the queries into tiles; each comes with the run of keys that its queries see."""
    num_rows = runs.end.shape[0]
    starts = range(0, num_rows, tile_queries)
    firsts = runs.first[::tile_queries].tolist()
    for start, first in zip(starts, firsts, strict=True):
        stop = min(start + tile_queries, num_rows)
        yield slice(start, stop), slice(first, max(first, int(runs.end[stop - 1])))


def run_tiles(runs: Runs, dtype: torch.dtype) -> Iterator[Tile]:
    """Tiles in which every query sees all keys of its run."""
    for rows, keys in tile_bounds(runs):
        bias = as_bias(visible_keys(runs, rows, keys), dtype)
        yield Tile(rows, keys, bias[None, :, None])


def _by_group(tensor: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """[rows, G*R, width] -> [G, rows*R, width], contiguous, in the accumulation dtype."""
    rows, heads, width = tensor.shape
    grouped = tensor.view(rows, groups, heads // groups, width).transpose(0, 1)
    return grouped.to(dtype).reshape(groups, rows * (heads // groups), width)


def _by_row(tensor: Tensor, groups: int) -> Tensor:
    """[rows, G*R] -> [G, rows*R, 1]."""
    return _by_group(tensor.unsqueeze(-1), groups, tensor.dtype)


def _store(target: Tensor, rows: slice, grouped: Tensor) -> None:
    """Write [G, rows*R, width] into target [T, G*R, width] at rows, rounding to its dtype."""
    groups, _, width = grouped.shape
    _, heads, _ = target.shape
    num_rows = rows.stop - rows.start
    tile = grouped.view(groups, num_rows, heads // groups, width).transpose(0, 1)
    target[rows].view(num_rows, groups, heads // groups, width).copy_(tile)


def _logits(q: Tensor, k: Tensor, tile: Tile, scale: float) -> Tensor:
    """Masked scores [G, queries*R, keys] of q [G, queries*R, K] and k [G, keys, K]."""
    unused = q.new_zeros(1)
    logits = torch.baddbmm(unused, q, k.transpose(1, 2), beta=0, alpha=scale)
    num_queries = tile.rows.stop - tile.rows.start
    logits.view(k.shape[0], num_queries, -1, k.shape[1]).add_(tile.bias)
    return logits


def attend_forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Iterable[Tile], scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each tile's queries over the keys it sees.

    Args:
        q: [T, H, K].
        k: [S, G, K].
        v: [S, G, V].
        tiles: cover every query once.

    Returns:
        out [T, H, V] in q's dtype; lse [T, H], natural log. A query without keys: 0 and -inf.
    """
    num_tokens, num_heads, _ = q.shape
    groups, value_width = v.shape[1], v.shape[2]
    dtype = accumulation_dtype(q.dtype)
    k, v = _by_group(k, groups, dtype), _by_group(v, groups, dtype)
    out = q.new_empty(num_tokens, num_heads, value_width)
    lse = torch.empty(num_tokens, num_heads, 1, dtype=dtype, device=q.device)
    for tile in tiles:
        if tile.keys.start == tile.keys.stop:
            out[tile.rows], lse[tile.rows] = 0.0, -torch.inf
            continue
        logits = _logits(_by_group(q[tile.rows], groups, dtype), k[:, tile.keys], tile, scale)
        top = logits.amax(-1, keepdim=True)
        top.masked_fill_(top == -torch.inf, 0.0)
        weights = logits.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        mixed = torch.bmm(weights, v[:, tile.keys])
        _store(out, tile.rows, mixed.div_(total.clamp(min=torch.finfo(dtype).tiny)))
        _store(lse, tile.rows, total.log_().add_(top))
    return out, lse.squeeze(-1)


def attend_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: Iterable[Tile],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attend_forward: dq, dk, dv in the dtypes of q, k, v."""
    groups = k.shape[1]
    dtype = accumulation_dtype(q.dtype)
    is_empty = lse == -torch.inf
    # d(loss)/d(logit) = p * (dout.v - delta): lse's own gradient only shifts delta.
    delta = (out.to(dtype) * dout.to(dtype)).sum(-1).sub_(dlse).masked_fill_(is_empty, 0.0)
    shift = lse.masked_fill(is_empty, 0.0)
    keys, values = _by_group(k, groups, dtype), _by_group(v, groups, dtype)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    dq = torch.empty_like(q)
    for tile in tiles:
        if tile.keys.start == tile.keys.stop:
            dq[tile.rows] = 0.0
            continue
        rows, run = tile.rows, tile.keys
        q_tile, dout_tile = _by_group(q[rows], groups, dtype), _by_group(dout[rows], groups, dtype)
        logits = _logits(q_tile, keys[:, run], tile, scale)
        weights = logits.sub_(_by_row(shift[rows], groups)).exp_()
        dv[:, run].baddbmm_(weights.transpose(1, 2), dout_tile)
        dweights = torch.bmm(dout_tile, values[:, run].transpose(1, 2))
        dlogits = dweights.sub_(_by_row(delta[rows], groups)).mul_(weights)
        dk[:, run].baddbmm_(dlogits.transpose(1, 2), q_tile, alpha=scale)
        _store(dq, rows, torch.bmm(dlogits, keys[:, run]).mul_(scale))
    return (
        dq,
        dk.transpose(0, 1).to(k.dtype).contiguous(),
        dv.transpose(0, 1).to(v.dtype).contiguous(),
    )
