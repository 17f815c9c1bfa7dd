"""Compressed, sliding and full attention: each query sees one run of keys."""

from torch import Tensor

from nsa_kernels.checks import accumulation_dtype
from nsa_kernels.shapes import NsaConfig
from nsa_kernels.torch_backend.runs import Runs, compressed_runs, full_runs, sliding_runs
from nsa_kernels.torch_backend.tiles import attend_backward, attend_forward, run_tiles


def _forward(q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float) -> tuple[Tensor, Tensor]:
    return attend_forward(q, k, v, run_tiles(runs, accumulation_dtype(q.dtype)), scale)


def _backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    runs: Runs,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = run_tiles(runs, accumulation_dtype(q.dtype))
    return attend_backward(dout, dlse, q, k, v, out, lse, tiles, scale)


def compressed_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, config: NsaConfig, scale: float
) -> tuple[Tensor, Tensor]:
    """out and lse over the compressed blocks that are complete at each query."""
    return _forward(q, k, v, compressed_runs(cu_seqlens, q.shape[0], config), scale)


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
    """dq, dk, dv of compressed_forward; rows of k and v behind the last block get zero."""
    runs = compressed_runs(cu_seqlens, q.shape[0], config)
    return _backward(dout, dlse, q, k, v, out, lse, runs, scale)


def sliding_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, config: NsaConfig, scale: float
) -> tuple[Tensor, Tensor]:
    """out and lse over the last window_size tokens; only keys near a tile are read."""
    return _forward(q, k, v, sliding_runs(cu_seqlens, q.shape[0], config), scale)


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
    runs = sliding_runs(cu_seqlens, q.shape[0], config)
    return _backward(dout, dlse, q, k, v, out, lse, runs, scale)


def full_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """out and lse over every token up to the query."""
    return _forward(q, k, v, full_runs(cu_seqlens, q.shape[0]), scale)


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
    return _backward(dout, dlse, q, k, v, out, lse, full_runs(cu_seqlens, q.shape[0]), scale)
