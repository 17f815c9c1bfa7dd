"""full_attention: each query over every token up to its own (Eq. 1), the causal baseline."""

from typing import Any

import torch
from torch import Tensor

from nsa_kernels import checks
from nsa_kernels.dispatch import Backend, backend_module, resolve_backend


@torch.library.custom_op("nsa_kernels::full_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    checks.check_offsets(cu_seqlens, q.shape[0])
    run = backend_module(backend).full_forward
    return run(q, k, v, cu_seqlens, scale)


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    return out, q.new_empty(q.shape[:2], dtype=checks.accumulation_dtype(q.dtype))


@torch.library.custom_op("nsa_kernels::full_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = backend_module(backend).full_backward
    return run(dout, dlse, q, k, v, out, lse, cu_seqlens, scale)


@_backward.register_fake
def _(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    dout, dlse = checks.output_gradients(dout, dlse, out, lse)
    dq, dk, dv = _backward(dout, dlse, q, k, v, out, lse, cu_seqlens, ctx.scale, ctx.backend)
    return dq, dk, dv, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Attend to every token up to the query's own: the causal baseline in the same layout.

    Args:
        q: [T, H, K], sequences packed one after the other.
        k: [T, G, K].
        v: [T, G, V].
        cu_seqlens: int32 [B+1], where each sequence starts, then T; None for one sequence.
        scale: factor on q.k, 1/sqrt(K) unless given.
        backend: "triton" or "torch"; None leaves it to the device (see dispatch.py).

    Returns:
        out [T, H, V] in q's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the backend cannot run.

    Source:
        arXiv 2502.11089, Eq. 1-2.
    """
    checks.check_query(q)
    checks.check_keys(q, k, v, rows=q.shape[0])
    offsets = checks.packed_offsets(cu_seqlens, q)
    chosen = resolve_backend(q, backend)
    checks.check_limits(chosen, q, v.shape[2], k.shape[1])
    out, _ = _forward(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        offsets,
        checks.resolve_scale(scale, q),
        chosen,
    )
    return out
