"""Fewer blocks where few suffice: of the chosen ones those that hold a share of the importance.

The paper has every query read n blocks. Here n is the most: the forced blocks are read, and of the
others the most important until, together, they hold the share top_p of what the compressed scores
give to all blocks. The choice itself is the kernels'; its importance is worked out again for the
chosen blocks, in plain torch, which costs a second pass over the compressed keys.
"""

import torch
from torch import Tensor

from nsa_kernels import NsaConfig, compressed_cu_seqlens

SCORES_AT_ONCE = 1 << 25
"""Scores of queries over compressed keys that exist at a time."""


def keep_top_p(
    blocks: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    top_p: float,
    positions: Tensor,
    cu_seqlens: Tensor,
    config: NsaConfig,
    scale: float,
) -> Tensor:
    """Those of the chosen blocks that a query reads.

    Args:
        blocks: int32 [T, G, n], from select_blocks.
        q: [T, H, K], k_cmp: [C, G, K] and lse: [T, H], as given to select_blocks.
        top_p: share of the importance of all blocks, of (0, 1].
        positions: int32 [T], of the tokens in their sequences.
        cu_seqlens: int32 [B + 1].

    Returns:
        int32 [T, G, n], ascending, -1 last. Not differentiable.
    """
    return _keep(
        blocks,
        q.detach(),
        k_cmp.detach(),
        lse.detach(),
        positions,
        cu_seqlens,
        config.sizes,
        top_p,
        scale,
    )


# An op of its own, so that a compiler does not unroll its tiles.
@torch.library.custom_op("nsa_platform::keep_top_p", mutates_args=())
def _keep(
    blocks: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    sizes: list[int],
    top_p: float,
    scale: float,
) -> Tensor:
    config, num_tokens = NsaConfig(*sizes), len(q)
    tokens = torch.arange(num_tokens, device=q.device)
    sequence = torch.searchsorted(cu_seqlens.long(), tokens, right=True) - 1
    first = compressed_cu_seqlens(cu_seqlens, config).long()[sequence]  # [T], of its sequence
    visible = (positions.long() + 1 - config.compression_block_size).div(
        config.compression_stride, rounding_mode="floor"
    )
    visible = (visible + 1).clamp(min=0)
    size = max(16, SCORES_AT_ONCE // (q.shape[1] * len(k_cmp)))
    kept = blocks.clone()
    for start in range(0, num_tokens, size):
        rows = slice(start, min(start + size, num_tokens))
        shares = _shares(
            blocks[rows], q[rows], k_cmp, lse[rows], first[rows], visible[rows], config, scale
        )
        kept[rows] = _most_important(blocks[rows], shares, positions[rows], config, top_p)
    return kept


@_keep.register_fake
def _(
    blocks: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    sizes: list[int],
    top_p: float,
    scale: float,
) -> Tensor:
    return torch.empty_like(blocks)


def _shares(
    blocks: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    first: Tensor,
    visible: Tensor,
    config: NsaConfig,
    scale: float,
) -> Tensor:
    """[rows, G, n]: the share of all importance (Eq. 9 and 10) that each chosen block has; 0 for
    none.

    Every visible compressed block lies within blocks to choose from and so counts l / d times,
    and the weights of a head add up to 1.
    """
    num_rows, heads, width = q.shape
    groups = k_cmp.shape[1]
    queries = q.view(num_rows, groups, heads // groups, width)
    scores = torch.einsum("tgrk,cgk->tgrc", queries.float(), k_cmp.float()) * scale
    shift = lse.masked_fill(lse == -torch.inf, 0.0).float().view(num_rows, groups, -1, 1)
    # Scores of hidden keys and of other sequences may be large, and are never gathered below.
    weights = (scores - shift).clamp(max=0.0).exp().mean(2)  # [rows, G, C]

    per_compressed = config.compression_block_size // config.compression_stride
    per_block = config.selection_block_size // config.compression_stride
    importance = torch.zeros(blocks.shape, dtype=weights.dtype, device=q.device)
    for offset in range(1 - per_compressed, per_block):
        strides = min(offset + per_compressed, per_block) - max(offset, 0)
        index = blocks.long() * per_block + offset
        is_met = (blocks >= 0) & (index >= 0) & (index < visible[:, None, None])
        place = torch.where(is_met, index + first[:, None, None], 0)
        importance += torch.where(is_met, weights.gather(2, place), 0.0) * strides
    return importance / per_compressed


def _most_important(
    blocks: Tensor, shares: Tensor, positions: Tensor, config: NsaConfig, top_p: float
) -> Tensor:
    """Forced blocks, then the most important until top_p is held; a tie goes to the lower block."""
    own = (positions.long() // config.selection_block_size)[:, None, None]
    is_forced = (blocks < config.num_initial_blocks) | (blocks > own - config.num_local_blocks)
    is_forced &= blocks >= 0
    rank = torch.where(is_forced, torch.inf, shares).masked_fill(blocks < 0, -1.0)
    order = rank.sort(dim=2, descending=True, stable=True).indices
    ordered = shares.gather(2, order)
    before = ordered.cumsum(2) - ordered
    is_read = (before < top_p) | is_forced.gather(2, order)
    is_read = torch.zeros_like(is_read).scatter_(2, order, is_read) & (blocks >= 0)
    absent = torch.iinfo(blocks.dtype).max
    kept = blocks.masked_fill(~is_read, absent).sort(2).values
    return kept.masked_fill(kept == absent, -1)
