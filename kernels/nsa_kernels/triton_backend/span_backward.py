"""Attention over one contiguous span of keys per query: compressed, sliding and full, backward.

Two passes, no atomics, so that equal inputs give equal bits: dq by queries, dk and dv by keys.
"""

import torch
from torch import Tensor

from nsa_kernels.shapes import NsaConfig
from nsa_kernels.triton_backend.span_dkv import span_dkv
from nsa_kernels.triton_backend.span_dq import span_dq
from nsa_kernels.triton_backend.span_forward import (
    Span,
    compressed_span,
    full_span,
    sliding_span,
)
from nsa_kernels.triton_backend.tiles import row_delta


def compressed_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    config: NsaConfig,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of compressed_forward; rows of k and v past the last block get zero."""
    span = compressed_span(cu_seqlens, config)
    return span_backward(dout, dlse, q, k, v, out, lse, cu_seqlens, span, scale)


def sliding_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    config: NsaConfig,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of sliding_forward."""
    span = sliding_span(cu_seqlens, config)
    return span_backward(dout, dlse, q, k, v, out, lse, cu_seqlens, span, scale)


def full_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of full_forward."""
    return span_backward(dout, dlse, q, k, v, out, lse, cu_seqlens, full_span(cu_seqlens), scale)


def span_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    span: Span,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of span_forward. dlse is the gradient of the natural lse."""
    if q.shape[0] == 0 or k.shape[0] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = row_delta(out, dout, lse, dlse)
    return span_gradients(dout, q, k, v, lse, delta, cu_seqlens, span, scale)


def span_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    cu_seqlens: Tensor,
    span: Span,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; where out's gradient is w * dout, give lse - log(w) and delta / w.

    Args:
        lse: fp32 [T, H], natural, as span_forward returned it.
        delta: fp32 [T, H], tiles.row_delta's.
    """
    if q.shape[0] == 0 or k.shape[0] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    given = (dout, q, k, v, lse, delta, cu_seqlens, span, scale)
    dq = span_dq(*given)
    dk, dv = span_dkv(*given)
    return dq, dk, dv
