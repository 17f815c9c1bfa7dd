"""Attention over tiles of queries: each tile meets one run of keys under an additive mask.

Query heads of a group share its keys without repeating them: a tile's rows are (query, head of the
group) pairs, one batched matrix product per tile with the groups as the batch. The backward pass
recomputes the probabilities tile by tile, as flash attention does.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_kernels.checks import accumulation_dtype
from nsa_kernels.torch_backend.runs import Runs

TILE_QUERIES = 64
"""Queries of a tile: enough work per Python step, few enough that a tile's logits stay in cache."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries `rows` against keys `keys`, both half-open runs of the packed order."""

    rows: slice
    keys: slice
    biases: list[tuple[slice, Tensor]]
    """What to add to columns of the logits (counted from keys.start): 0 where a query sees a key,
    else -inf; each broadcasts to [G, queries, R, columns]."""


def _edge_bias(runs: Runs, rows: slice, keys: slice, dtype: torch.dtype) -> Tensor:
    key = torch.arange(keys.start, keys.stop, device=runs.end.device)
    hidden = (key < runs.first[rows, None]) | (key >= runs.end[rows, None])
    bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return bias.masked_fill_(hidden, -torch.inf)[None, :, None]


def run_tiles(runs: Runs, dtype: torch.dtype) -> Iterator[Tile]:
    """Tiles in which every query sees all keys of its run.

    Most keys of a tile are seen by all of its queries; only the columns before the last query's
    first key and after the first query's last key need a mask.
    """
    num_rows = runs.end.shape[0]
    for start in range(0, num_rows, TILE_QUERIES):
        rows = slice(start, min(start + TILE_QUERIES, num_rows))
        first, all_from = runs.first[start], runs.first[rows.stop - 1]
        all_to, end = runs.end[start], runs.end[rows.stop - 1]
        first, all_from, all_to, end = torch.stack([first, all_from, all_to, end]).tolist()
        keys = slice(first, max(first, end))
        edges = [slice(first, all_from), slice(all_to, end)]
        if all_to <= all_from:
            edges = [keys]
        yield Tile(
            rows,
            keys,
            [
                (slice(e.start - first, e.stop - first), _edge_bias(runs, rows, e, dtype))
                for e in edges
                if e.start < e.stop
            ],
        )


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
    by_head = logits.view(k.shape[0], num_queries, -1, k.shape[1])
    for columns, bias in tile.biases:
        by_head[..., columns].add_(bias)
    return logits


def _softmax(logits: Tensor, top: Tensor) -> Tensor:
    """Softmax over the keys; a row without visible keys (top is -inf) becomes zeros, not NaN."""
    weights = logits.softmax(-1)
    is_empty = top == -torch.inf
    return weights.masked_fill_(is_empty, 0.0) if bool(is_empty.any()) else weights


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
        weights = _softmax(logits, top)
        _store(out, tile.rows, torch.bmm(weights, v[:, tile.keys]))
        # The largest weight is 1 / sum(exp(logit - top)).
        tile_lse = top - weights.amax(-1, keepdim=True).log_()
        _store(lse, tile.rows, tile_lse.masked_fill_(top == -torch.inf, -torch.inf))
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
    # d(loss)/d(logit) = p * (dout.v - delta): lse's own gradient only shifts delta.
    delta = (out.to(dtype) * dout.to(dtype)).sum(-1).sub_(dlse).masked_fill_(lse == -torch.inf, 0.0)
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
        # A tile holds all keys of its rows: softmax needs no stored normaliser, and is faster here
        # than exp, which is slow at -inf.
        weights = _softmax(logits, _by_row(lse[rows], groups))
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
