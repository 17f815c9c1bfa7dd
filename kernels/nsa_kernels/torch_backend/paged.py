"""Attention of new tokens against paged caches: gather the live pages, then the same tiles."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_kernels.checks import accumulation_dtype
from nsa_kernels.shapes import NsaConfig, num_compressed_blocks
from nsa_kernels.torch_backend.runs import Runs, num_visible_blocks
from nsa_kernels.torch_backend.selected import chosen_tiles
from nsa_kernels.torch_backend.selection import choose_blocks
from nsa_kernels.torch_backend.tiles import attend_forward, run_tiles


@dataclass(frozen=True, slots=True)
class _NewTokens:
    """The new tokens of one sequence: packed rows, and their positions in the sequence."""

    sequence: int
    rows: slice
    positions: Tensor
    context: int


def _new_tokens(cu_seqlens: Tensor, context_lens: Tensor) -> list[_NewTokens]:
    offsets = cu_seqlens.tolist()
    found = []
    for b, context in enumerate(context_lens.tolist()):
        rows = slice(offsets[b], offsets[b + 1])
        length = rows.stop - rows.start
        if length == 0:
            continue
        positions = torch.arange(context - length, context, device=cu_seqlens.device)
        found.append(_NewTokens(b, rows, positions, context))
    return found


def _gather(
    pages: Tensor, page_table: Tensor, sequence: int, start: int, stop: int, page_rows: int
) -> Tensor:
    """Rows [start, stop) of a sequence's logical rows, from pages of page_rows rows each."""
    first, last = start // page_rows, -(-stop // page_rows)
    physical = page_table[sequence, first:last].long()
    gathered = pages[physical].flatten(0, 1)
    return gathered[start - first * page_rows : stop - first * page_rows]


def _compressed(
    new: _NewTokens,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    page_table: Tensor,
    config: NsaConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The compressed branch's out, and the blocks it makes the selected branch read."""
    blocks = num_compressed_blocks(new.context, config)
    page_rows = k_cmp.shape[1]
    keys = _gather(k_cmp, page_table, new.sequence, 0, blocks, page_rows)
    values = _gather(v_cmp, page_table, new.sequence, 0, blocks, page_rows)
    ends = num_visible_blocks(new.positions, config)
    runs = Runs(first=torch.zeros_like(ends), end=ends)
    tiles = run_tiles(runs, accumulation_dtype(q.dtype))
    out, lse = attend_forward(q, keys, values, tiles, scale)
    return out, choose_blocks(q, keys, lse, new.positions, config, scale)


def _selected(
    new: _NewTokens,
    q: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    block_indices: Tensor,
    page_table: Tensor,
    config: NsaConfig,
    scale: float,
) -> Tensor:
    page_rows = k_slc.shape[1]
    keys = _gather(k_slc, page_table, new.sequence, 0, new.context, page_rows)
    values = _gather(v_slc, page_table, new.sequence, 0, new.context, page_rows)
    runs = Runs(first=torch.zeros_like(new.positions), end=new.positions + 1)
    tiles = chosen_tiles(block_indices, runs, config, accumulation_dtype(q.dtype))
    return attend_forward(q, keys, values, tiles, scale)[0]


def _sliding(
    new: _NewTokens,
    q: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    table: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    start = max(0, new.context - new.positions.shape[0] - window + 1)
    keys = _gather(k_win, table, new.sequence, start, new.context, k_win.shape[1])
    values = _gather(v_win, table, new.sequence, start, new.context, v_win.shape[1])
    ends = new.positions + 1 - start
    runs = Runs(first=(ends - window).clamp_(min=0), end=ends)
    return attend_forward(q, keys, values, run_tiles(runs, accumulation_dtype(q.dtype)), scale)[0]


def paged_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    page_table: Tensor,
    window_page_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    config: NsaConfig,
    scale: float,
    *,
    block_indices: Tensor | None = None,
) -> Tensor:
    """out [T, H, V] of the whole NSA op for the new tokens; reads lengths on the host."""
    out = q.new_empty(q.shape[0], q.shape[1], v_slc.shape[-1])
    dtype = accumulation_dtype(q.dtype)
    for new in _new_tokens(cu_seqlens, context_lens):
        rows = q[new.rows]
        out_cmp, chosen = _compressed(new, rows, k_cmp, v_cmp, page_table, config, scale)
        if block_indices is not None:
            block_indices[new.rows] = chosen
        out_slc = _selected(new, rows, k_slc, v_slc, chosen, page_table, config, scale)
        out_win = _sliding(new, rows, k_win, v_win, window_page_table, config.window_size, scale)
        gate = gates[new.rows].to(dtype).unsqueeze(-1)
        mixed = gate[:, :, 0] * out_cmp + gate[:, :, 1] * out_slc + gate[:, :, 2] * out_win
        out[new.rows] = mixed.to(out.dtype)
    return out


def full_paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """out [T, H, V] of causal attention for the new tokens; reads lengths on the host."""
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[-1])
    for new in _new_tokens(cu_seqlens, context_lens):
        keys = _gather(k, page_table, new.sequence, 0, new.context, k.shape[1])
        values = _gather(v, page_table, new.sequence, 0, new.context, v.shape[1])
        runs = Runs(first=torch.zeros_like(new.positions), end=new.positions + 1)
        tiles = run_tiles(runs, accumulation_dtype(q.dtype))
        out[new.rows] = attend_forward(q[new.rows], keys, values, tiles, scale)[0]
    return out
