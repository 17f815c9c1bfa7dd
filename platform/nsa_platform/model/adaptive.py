"""Fewer blocks where few suffice: of the chosen ones those that hold a share of the importance.

The paper has every query read n blocks. Here n is the most: the forced blocks are read, and of the
others the most important until, together, they hold the share top_p of what the compressed scores
give to all blocks. The choice itself is the kernels'; the importance of the chosen blocks is worked
out again in plain torch, from the compressed keys that meet them.
"""

import torch
from torch import Tensor

from nsa_kernels import NsaConfig, compressed_cu_seqlens

CHANNELS_AT_ONCE = 1 << 26
"""Channels of compressed keys that are laid out at a time, each query's own."""


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
    size = max(16, CHANNELS_AT_ONCE // _channels_of_a_token(k_cmp, config))
    kept = blocks.clone()
    if not len(k_cmp):
        return kept  # Sequences too short to have any importance: all blocks are near.
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


def _channels_of_a_token(k_cmp: Tensor, config: NsaConfig) -> int:
    """Channels of the compressed keys that meet the blocks of one token, over all groups."""
    strides = config.selection_block_size + config.compression_block_size
    met = strides // config.compression_stride - 1
    return config.num_selected_blocks * met * k_cmp.shape[1] * k_cmp.shape[2]


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
    per_compressed = config.compression_block_size // config.compression_stride
    per_block = config.selection_block_size // config.compression_stride
    offsets = torch.arange(1 - per_compressed, per_block, device=q.device)
    strides = (offsets + per_compressed).clamp(max=per_block) - offsets.clamp(min=0)
    index = blocks.long()[..., None] * per_block + offsets  # [rows, G, n, met]
    is_met = (blocks >= 0)[..., None] & (index >= 0) & (index < visible[:, None, None, None])
    place = torch.where(is_met, index + first[:, None, None, None], 0)
    group = torch.arange(k_cmp.shape[1], device=q.device)[:, None, None]

    keys = k_cmp[place, group].flatten(2, 3).float()  # [rows, G, n * met, K]
    queries = q.unflatten(1, (k_cmp.shape[1], -1)).float()
    shift = lse.masked_fill(lse == -torch.inf, 0.0).float().view(*queries.shape[:3], 1)
    # A key that is not met may have a large score, which exp must not turn into infinity.
    scores = (queries @ keys.mT * scale - shift).clamp(max=0.0)
    weights = scores.exp().mean(2).view(is_met.shape)
    return torch.where(is_met, weights * strides, 0.0).sum(3) / per_compressed


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
