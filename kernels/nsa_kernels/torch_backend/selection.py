"""Which blocks each query reads: importance by overlap, then the top n of each group (Eq. 8-11)."""

import itertools

import torch
from torch import Tensor

from nsa_kernels.checks import accumulation_dtype
from nsa_kernels.shapes import NsaConfig, num_compressed_blocks
from nsa_kernels.torch_backend.runs import num_visible_blocks, sequence_starts

_TILE_QUERIES = 256


def fold_overlaps(weights: Tensor, num_blocks: int, config: NsaConfig) -> Tensor:
    """Sum compressed blocks' weights into the selection blocks that they overlap (Eq. 9).

    Counted from 0, block j meets the compressed blocks i = j*l'/d + shift for shift from 1 - l/d to
    l'/d - 1, and shares min(shift*d + l, l') - max(shift*d, 0) tokens with each. The shifts are
    added one after the other in ascending order, so equal weights give bit-equal sums.

    Args:
        weights: [..., C] of the first C compressed blocks of a sequence.

    Returns:
        [..., num_blocks], overlapping tokens / d times weight, summed.
    """
    per_compressed = config.compression_block_size // config.compression_stride
    per_block = config.selection_block_size // config.compression_stride
    padded = weights.new_zeros(*weights.shape[:-1], num_blocks * per_block + per_compressed - 1)
    padded[..., per_compressed - 1 : per_compressed - 1 + weights.shape[-1]] = weights
    importance = weights.new_zeros(*weights.shape[:-1], num_blocks)
    for shift in range(1 - per_compressed, per_block):
        strides = min(shift + per_compressed, per_block) - max(shift, 0)
        met = padded[..., shift + per_compressed - 1 :: per_block][..., :num_blocks]
        importance.add_(met, alpha=strides)
    return importance


def _group_weights(
    q: Tensor, k_cmp: Tensor, lse: Tensor, positions: Tensor, config: NsaConfig, scale: float
) -> Tensor:
    """[G, rows, C]: each query's attention to the compressed blocks, summed over its group."""
    dtype = accumulation_dtype(q.dtype)
    (num_rows, heads, width), (blocks, groups, _) = q.shape, k_cmp.shape
    queries = q.view(num_rows, groups, heads // groups, width).permute(1, 0, 2, 3).to(dtype)
    keys = k_cmp.permute(1, 2, 0).to(dtype)
    logits = torch.bmm(queries.reshape(groups, -1, width), keys).mul_(scale)
    logits = logits.view(groups, num_rows, heads // groups, blocks)
    shift = lse.masked_fill(lse == -torch.inf, 0.0).view(num_rows, groups, -1, 1).transpose(0, 1)
    block = torch.arange(blocks, device=q.device)
    hidden = block >= num_visible_blocks(positions, config)[:, None]
    return logits.sub_(shift).exp_().masked_fill_(hidden[:, None], 0.0).sum(2)


def choose_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, positions: Tensor, config: NsaConfig, scale: float
) -> Tensor:
    """Choose for queries of one sequence.

    Args:
        q: [rows, H, K].
        k_cmp: [C, G, K], the sequence's compressed keys, at least those visible to the rows.
        lse: [rows, H], of the compressed branch.
        positions: int64 [rows], ascending positions within the sequence.

    Returns:
        int32 [rows, G, n], ascending, -1 last.
    """
    n = config.num_selected_blocks
    own = positions // config.selection_block_size
    num_blocks = int(own[-1]) + 1
    weights = _group_weights(q, k_cmp, lse, positions, config, scale)
    importance = fold_overlaps(weights, num_blocks, config).float()
    block = torch.arange(num_blocks, device=q.device)
    is_local = block > own[:, None] - config.num_local_blocks
    is_forced = is_local | (block < config.num_initial_blocks)
    importance.masked_fill_(is_forced, torch.inf)
    # The bits of a float >= 0 rank like the float; below them, the lower block ranks higher.
    rank = importance.view(torch.int32).long() * 2**32 + (2**31 - 1 - block)
    rank.masked_fill_(block > own[:, None], -1)
    top = rank.topk(min(n, num_blocks), sorted=False)
    chosen = top.indices.masked_fill_(top.values < 0, num_blocks).sort().values
    chosen.masked_fill_(chosen == num_blocks, -1)
    chosen = torch.nn.functional.pad(chosen, (0, max(0, n - num_blocks)), value=-1)
    return chosen.transpose(0, 1).to(torch.int32)


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, cu_seqlens: Tensor, config: NsaConfig, scale: float
) -> Tensor:
    """int32 [T, G, n]: scored only where a query has more than n blocks to choose from."""
    n, num_tokens, groups = config.num_selected_blocks, q.shape[0], k_cmp.shape[1]
    tokens = torch.arange(num_tokens, device=q.device)
    positions = tokens - sequence_starts(cu_seqlens, num_tokens)
    slots = torch.arange(n, dtype=torch.int32, device=q.device)
    own = (positions // config.selection_block_size)[:, None]
    every = torch.where(slots <= own, slots, -1)
    chosen = every[:, None].expand(-1, groups, -1).contiguous()
    offsets = cu_seqlens.tolist()
    first_block = 0
    for start, stop in itertools.pairwise(offsets):
        num_blocks = num_compressed_blocks(stop - start, config)
        keys = k_cmp[first_block : first_block + num_blocks]
        first_block += num_blocks
        for row in range(start + n * config.selection_block_size, stop, _TILE_QUERIES):
            rows = slice(row, min(row + _TILE_QUERIES, stop))
            visible = keys[: num_compressed_blocks(rows.stop - start, config)]
            chosen[rows] = choose_blocks(
                q[rows], visible, lse[rows], positions[rows], config, scale
            )
    return chosen
