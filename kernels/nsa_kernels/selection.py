"""select_blocks: which selection blocks each query group reads (Eq. 8-11).

Importance is free: the compressed branch already knows how much each query cares for each
compressed block. A selection block's importance is the sum of those cares, each weighted by the
tokens that the two blocks share, and summed over the query heads of a group, so that the group
reads one set of blocks.
"""

import torch
from torch import Tensor

from nsa_kernels import checks
from nsa_kernels.dispatch import Backend, backend_module, resolve_backend
from nsa_kernels.shapes import NsaConfig


@torch.library.custom_op("nsa_kernels::select_blocks", mutates_args=())
def _select(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    sizes: list[int],
    scale: float,
    backend: str,
) -> Tensor:
    config = NsaConfig(*sizes)
    checks.check_offsets(cu_seqlens, q.shape[0])
    checks.check_compressed_rows(k_cmp, cu_seqlens, config)
    return backend_module(backend).select_blocks(q, k_cmp, lse, cu_seqlens, config, scale)


@_select.register_fake
def _(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    sizes: list[int],
    scale: float,
    backend: str,
) -> Tensor:
    shape = (q.shape[0], k_cmp.shape[1], NsaConfig(*sizes).num_selected_blocks)
    return q.new_empty(shape, dtype=torch.int32)


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    config: NsaConfig,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Choose the n selection blocks that each query group reads.

    importance(t, g, j) = sum over the group's heads and over the compressed blocks i visible to t
    of overlap(i, j) / d * exp(scale q.k_i - lse), overlap counted in tokens. The candidates are
    blocks 0 to t // l'. The first num_initial_blocks and the last num_local_blocks of them are
    always chosen, then the most important in float32; a tie goes to the lower block. The same
    inputs always give the same blocks.

    Args:
        q: [T, H, K], as given to compressed_attention.
        k_cmp: [C, G, K], as given to compressed_attention.
        lse: [T, H], as compressed_attention returned it.
        cu_seqlens: int32 [B+1], where each sequence starts, then T; None for one sequence.
        scale: factor on q.k, 1/sqrt(K) unless given; the one given to compressed_attention.
        backend: "triton" or "torch"; None leaves it to the device (see dispatch.py).

    Returns:
        int32 [T, G, n]: block numbers within the query's sequence, ascending, padded with -1 at
        the end where a query has fewer than n candidates. Not differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the backend cannot run.

    Source:
        arXiv 2502.11089, Eq. 8-11. Eq. 9 counts blocks from 1. Counted from 0, its index is
        (l'/d) j + m - n; reference.py states it as overlap instead and needs no index.
    """
    checks.check_query(q)
    checks.check_config(config)
    checks.check_shape("k_cmp", k_cmp, "[C, G, K]", (None, None, q.shape[2]))
    checks.check_like_query("k_cmp", k_cmp, q)
    checks.check_groups("k_cmp", k_cmp.shape[1], q)
    checks.check_lse(lse, q)
    offsets = checks.packed_offsets(cu_seqlens, q)
    chosen = resolve_backend(q, backend)
    checks.check_limits(chosen, q, q.shape[2], k_cmp.shape[1])
    return _select(
        q.detach().contiguous(),
        k_cmp.detach().contiguous(),
        lse.detach().contiguous(),
        offsets,
        config.sizes,
        checks.resolve_scale(scale, q),
        chosen,
    )
