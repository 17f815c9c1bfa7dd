"""nsa_attention: the three branches of Native Sparse Attention, mixed by their gates (Eq. 5)."""

from typing import Any

import torch
from torch import Tensor

from nsa_kernels import checks
from nsa_kernels.compressed import compressed_attention
from nsa_kernels.dispatch import Backend, backend_module, resolve_backend
from nsa_kernels.selected import selected_attention
from nsa_kernels.selection import select_blocks
from nsa_kernels.shapes import NsaConfig
from nsa_kernels.sliding import sliding_attention


@torch.library.custom_op("nsa_kernels::mix_branches", mutates_args=())
def _mix(out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, gates: Tensor, backend: str) -> Tensor:
    return backend_module(backend).mix_forward(out_cmp, out_slc, out_win, gates)


@_mix.register_fake
def _(out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, gates: Tensor, backend: str) -> Tensor:
    return torch.empty_like(out_cmp)


@torch.library.custom_op("nsa_kernels::mix_branches_backward", mutates_args=())
def _mix_backward(
    dout: Tensor, out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, gates: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backend_module(backend).mix_backward(dout, out_cmp, out_slc, out_win, gates)


@_mix_backward.register_fake
def _(
    dout: Tensor, out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, gates: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = torch.empty_like
    return like(out_cmp), like(out_slc), like(out_win), like(gates)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # The branches save their outputs for their own backward: nothing is kept twice.
    ctx.save_for_backward(*inputs[:4])
    ctx.backend = inputs[4]


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return (*_mix_backward(dout.contiguous(), *ctx.saved_tensors, ctx.backend), None)


_mix.register_autograd(_gradients, setup_context=_setup_context)


def _check(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
) -> None:
    """Refuse what does not fit before any branch runs."""
    checks.check_query(q)
    rows = q.shape[0]
    checks.check_keys(q, k_cmp, v_cmp, names=("k_cmp", "v_cmp"))
    for names, k, v in ((("k_slc", "v_slc"), k_slc, v_slc), (("k_win", "v_win"), k_win, v_win)):
        checks.check_keys(q, k, v, names=names, rows=rows)
        checks.check_branch(names, k, v, k_cmp, v_cmp)
    checks.check_gates(gates, q)


def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    *,
    config: NsaConfig,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Native Sparse Attention: compressed, selected and sliding attention, gated and summed.

    The compressed branch's scores choose the blocks that the selected branch reads; no gradient
    flows through that choice (the paper calls it non-differentiable, section 6.1).

    Args:
        q: [T, H, K], sequences packed one after the other; all branches share it.
        k_cmp: [C, G, K], one key per complete compression block (see compressed_attention).
        v_cmp: [C, G, V].
        k_slc: [T, G, K]; the paper gives each branch its own keys and values.
        v_slc: [T, G, V].
        k_win: [T, G, K].
        v_win: [T, G, V].
        gates: [T, H, 3], weights of the branches in the order cmp, slc, win; q's dtype or float32.
        cu_seqlens: int32 [B+1], where each sequence starts, then T; None for one sequence.
        scale: factor on q.k, 1/sqrt(K) unless given.
        backend: "triton" or "torch"; None leaves it to the device (see dispatch.py).

    Returns:
        out [T, H, V] in q's dtype; the branches are summed in float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the backend cannot run.

    Source:
        arXiv 2502.11089, Eq. 5.
    """
    _check(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
    offsets = checks.packed_offsets(cu_seqlens, q)
    chosen = resolve_backend(q, backend)
    q = q.contiguous()
    k_cmp = k_cmp.contiguous()
    out_cmp, lse = compressed_attention(
        q, k_cmp, v_cmp, config=config, cu_seqlens=offsets, scale=scale, backend=chosen
    )
    blocks = select_blocks(
        q, k_cmp, lse, config=config, cu_seqlens=offsets, scale=scale, backend=chosen
    )
    out_slc, _ = selected_attention(
        q, k_slc, v_slc, blocks, config=config, cu_seqlens=offsets, scale=scale, backend=chosen
    )
    out_win, _ = sliding_attention(
        q, k_win, v_win, config=config, cu_seqlens=offsets, scale=scale, backend=chosen
    )
    return _mix(out_cmp, out_slc, out_win, gates.contiguous(), chosen)
