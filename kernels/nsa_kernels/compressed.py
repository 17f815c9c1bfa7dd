"""compressed_attention: each query over the compressed blocks that are complete (Eq. 7)."""

from typing import Any

import torch
from torch import Tensor

from nsa_kernels import checks
from nsa_kernels.dispatch import Backend, backend_module, resolve_backend
from nsa_kernels.shapes import NsaConfig


@torch.library.custom_op("nsa_kernels::compressed_attention", mutates_args=())
def _forward(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    cu_seqlens: Tensor,
    sizes: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    config = NsaConfig(*sizes)
    checks.check_offsets(cu_seqlens, q.shape[0])
    checks.check_compressed_rows(k_cmp, cu_seqlens, config)
    run = backend_module(backend).compressed_forward
    return run(q, k_cmp, v_cmp, cu_seqlens, config, scale)


@_forward.register_fake
def _(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    cu_seqlens: Tensor,
    sizes: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], v_cmp.shape[2])
    return out, q.new_empty(q.shape[:2], dtype=checks.accumulation_dtype(q.dtype))


@torch.library.custom_op("nsa_kernels::compressed_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    sizes: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = backend_module(backend).compressed_backward
    config = NsaConfig(*sizes)
    return run(dout, dlse, q, k_cmp, v_cmp, out, lse, cu_seqlens, config, scale)


@_backward.register_fake
def _(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    sizes: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k_cmp), torch.empty_like(v_cmp)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k_cmp, v_cmp, cu_seqlens, ctx.sizes, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k_cmp, v_cmp, *output, cu_seqlens)


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k_cmp, v_cmp, out, lse, cu_seqlens = ctx.saved_tensors
    dout, dlse = checks.output_gradients(dout, dlse, out, lse)
    dq, dk, dv = _backward(
        dout, dlse, q, k_cmp, v_cmp, out, lse, cu_seqlens, ctx.sizes, ctx.scale, ctx.backend
    )
    return dq, dk, dv, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    config: NsaConfig,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the compressed blocks that are complete at each query.

    Block i of a sequence covers its tokens [i*d, i*d + l) and is visible to position t iff
    i*d + l - 1 <= t. The first l - 1 tokens see none.

    Args:
        q: [T, H, K], sequences packed one after the other.
        k_cmp: [C, G, K], one key per complete block, sequence after sequence, where
            compressed_cu_seqlens says. Rows behind the last block are never read.
        v_cmp: [C, G, V].
        cu_seqlens: int32 [B+1], where each sequence starts, then T; None for one sequence.
        scale: factor on q.k, 1/sqrt(K) unless given.
        backend: "triton" or "torch"; None leaves it to the device (see dispatch.py).

    Returns:
        out [T, H, V] in q's dtype, and lse [T, H], the natural log of the sum of exp(scale q.k) in
        float32 (float64 for float64 inputs). Where no block is visible: 0 and -inf. Both are
        differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the backend cannot run.

    Source:
        arXiv 2502.11089, Eq. 7; block indices count from 0 here.
    """
    checks.check_query(q)
    checks.check_config(config)
    checks.check_keys(q, k_cmp, v_cmp, names=("k_cmp", "v_cmp"))
    offsets = checks.packed_offsets(cu_seqlens, q)
    chosen = resolve_backend(q, backend)
    checks.check_limits(chosen, q, v_cmp.shape[2], k_cmp.shape[1])
    return _forward(
        q.contiguous(),
        k_cmp.contiguous(),
        v_cmp.contiguous(),
        offsets,
        config.sizes,
        checks.resolve_scale(scale, q),
        chosen,
    )
