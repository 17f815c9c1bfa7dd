"""selected_attention: each query over the raw tokens of its group's chosen blocks (Eq. 12)."""

from typing import Any

import torch
from torch import Tensor

from nsa_kernels import checks
from nsa_kernels.dispatch import Backend, backend_module, resolve_backend
from nsa_kernels.shapes import NsaConfig


@torch.library.custom_op("nsa_kernels::selected_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    sizes: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    checks.check_offsets(cu_seqlens, q.shape[0])
    checks.check_block_values(block_indices, cu_seqlens, NsaConfig(*sizes))
    run = backend_module(backend).selected_forward
    return run(q, k, v, block_indices, cu_seqlens, NsaConfig(*sizes), scale)


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    sizes: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    return out, q.new_empty(q.shape[:2], dtype=checks.accumulation_dtype(q.dtype))


@torch.library.custom_op("nsa_kernels::selected_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    sizes: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = backend_module(backend).selected_backward
    config = NsaConfig(*sizes)
    return run(dout, dlse, q, k, v, out, lse, block_indices, cu_seqlens, config, scale)


@_backward.register_fake
def _(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    sizes: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, block_indices, cu_seqlens, ctx.sizes, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, block_indices, cu_seqlens)


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, block_indices, cu_seqlens = ctx.saved_tensors
    dout, dlse = checks.output_gradients(dout, dlse, out, lse)
    dq, dk, dv = _backward(
        dout, dlse, q, k, v, out, lse, block_indices, cu_seqlens, ctx.sizes, ctx.scale, ctx.backend
    )
    return dq, dk, dv, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    config: NsaConfig,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the raw tokens of the chosen blocks, up to the query's own token.

    Position t of a sequence sees position s iff s <= t and s // l' is among its group's blocks.

    Args:
        q: [T, H, K], sequences packed one after the other.
        k: [T, G, K].
        v: [T, G, V].
        block_indices: int32 [T, G, n], block numbers within the query's sequence in any order, -1
            for none. A block that the sequence does not have is refused on the CPU and undefined on
            a GPU, where reading the values would stop it. None must be named twice for one query;
            that is not checked.
        cu_seqlens: int32 [B+1], where each sequence starts, then T; None for one sequence.
        scale: factor on q.k, 1/sqrt(K) unless given.
        backend: "triton" or "torch"; None leaves it to the device (see dispatch.py).

    Returns:
        out [T, H, V] in q's dtype, and lse [T, H], the natural log of the sum of exp(scale q.k) in
        float32 (float64 for float64 inputs). A query whose blocks hold no visible token: 0 and
        -inf. Differentiable in q, k and v; the blocks count as constants.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the backend cannot run.

    Source:
        arXiv 2502.11089, Eq. 11-12; blocks count from 0 here.
    """
    checks.check_query(q)
    checks.check_config(config)
    checks.check_keys(q, k, v, rows=q.shape[0])
    checks.check_block_indices(block_indices, q, k.shape[1], config)
    offsets = checks.packed_offsets(cu_seqlens, q)
    chosen = resolve_backend(q, backend)
    checks.check_limits(chosen, q, v.shape[2], k.shape[1])
    return _forward(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        block_indices.contiguous(),
        offsets,
        config.sizes,
        checks.resolve_scale(scale, q),
        chosen,
    )
