"""nsa_attention: the three branches of Native Sparse Attention, mixed by their gates (Eq. 5)."""

from typing import Any

import torch
from torch import Tensor

from nsa_kernels import checks
from nsa_kernels.branches import Branches, Inputs
from nsa_kernels.dispatch import Backend, backend_module, resolve_backend
from nsa_kernels.shapes import NsaConfig

# out, and Branches in its order: what a pass returns to torch is a plain tuple of tensors.
_Passed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("nsa_kernels::nsa_attention", mutates_args=())
def _forward(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    cu_seqlens: Tensor,
    sizes: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    config = NsaConfig(*sizes)
    checks.check_offsets(cu_seqlens, q.shape[0])
    checks.check_compressed_rows(k_cmp, cu_seqlens, config)
    checks.check_gate_values(gates)
    inputs = Inputs(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
    out, branches = backend_module(backend).nsa_forward(inputs, cu_seqlens, config, scale)
    return (out, *branches)


@_forward.register_fake
def _(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    cu_seqlens: Tensor,
    sizes: list[int],
    scale: float,
    backend: str,
) -> _Passed:
    config = NsaConfig(*sizes)
    num_tokens, num_heads, _ = q.shape

    def out() -> Tensor:
        return q.new_empty(num_tokens, num_heads, v_cmp.shape[2])

    def lse() -> Tensor:
        return q.new_empty(num_tokens, num_heads, dtype=checks.accumulation_dtype(q.dtype))

    chosen = 0 if config.sees_all(num_tokens) else num_tokens
    blocks = cu_seqlens.new_empty(chosen, k_slc.shape[1], config.num_selected_blocks)
    return out(), out(), lse(), out(), lse(), out(), lse(), blocks


@torch.library.custom_op("nsa_kernels::nsa_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    inputs: list[Tensor],
    branches: list[Tensor],
    cu_seqlens: Tensor,
    sizes: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = backend_module(backend).nsa_backward
    kept, config = Branches(*branches), NsaConfig(*sizes)
    return tuple(run(dout, Inputs(*inputs), kept, cu_seqlens, config, scale))


@_backward.register_fake
def _(
    dout: Tensor,
    inputs: list[Tensor],
    branches: list[Tensor],
    cu_seqlens: Tensor,
    sizes: list[int],
    scale: float,
    backend: str,
) -> _Passed:
    return Inputs(*map(torch.empty_like, inputs))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, ctx.sizes, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*inputs[:9], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, dout: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = list(ctx.saved_tensors)
    gradients = _backward(
        dout.contiguous(), saved[:8], saved[9:], saved[8], ctx.sizes, ctx.scale, ctx.backend
    )
    return (*gradients, None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_setup_context)


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
        gates: [T, H, 3], weights of the branches in the order cmp, slc, win, none negative; q's
            dtype or float32. A negative one is refused on the CPU; on a GPU, where reading the
            values would stop it, its gradients are NaN.
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
    checks.check_config(config)
    offsets = checks.packed_offsets(cu_seqlens, q)
    chosen = resolve_backend(q, backend)
    checks.check_limits(chosen, q, v_cmp.shape[2], k_cmp.shape[1])
    given = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
    out, *_ = _forward(
        *(tensor.contiguous() for tensor in given),
        offsets,
        config.sizes,
        checks.resolve_scale(scale, q),
        chosen,
    )
    return out
