"""The whole op: three branches mixed by their gates (Eq. 5), forward and backward."""

from torch import Tensor

from nsa_kernels.branches import Branches, Inputs
from nsa_kernels.shapes import NsaConfig
from nsa_kernels.triton_backend.importance import select_blocks
from nsa_kernels.triton_backend.mixing import mix_backward, mix_forward
from nsa_kernels.triton_backend.selected_backward import selected_gradients
from nsa_kernels.triton_backend.selected_forward import selected_forward
from nsa_kernels.triton_backend.span_backward import span_gradients
from nsa_kernels.triton_backend.span_forward import (
    compressed_span,
    full_forward,
    full_span,
    sliding_forward,
    sliding_span,
    span_forward,
)


def nsa_forward(
    inputs: Inputs, cu_seqlens: Tensor, config: NsaConfig, scale: float
) -> tuple[Tensor, Branches]:
    """out [T, H, V] and what the backward pass needs of the branches."""
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = inputs
    span = compressed_span(cu_seqlens, config)
    out_cmp, lse_cmp = span_forward(q, k_cmp, v_cmp, cu_seqlens, span, scale)
    if config.sees_all(q.shape[0]):
        blocks = cu_seqlens.new_empty(0, k_slc.shape[1], config.num_selected_blocks)
        out_slc, lse_slc = full_forward(q, k_slc, v_slc, cu_seqlens, scale)
    else:
        blocks = select_blocks(q, k_cmp, lse_cmp, cu_seqlens, config, scale, span.cu_keys)
        out_slc, lse_slc = selected_forward(q, k_slc, v_slc, blocks, cu_seqlens, config, scale)
    out_win, lse_win = sliding_forward(q, k_win, v_win, cu_seqlens, config, scale)
    branches = Branches(out_cmp, lse_cmp, out_slc, lse_slc, out_win, lse_win, blocks)
    return mix_forward(out_cmp, out_slc, out_win, gates), branches


def nsa_backward(
    dout: Tensor,
    inputs: Inputs,
    branches: Branches,
    cu_seqlens: Tensor,
    config: NsaConfig,
    scale: float,
) -> Inputs:
    """Gradients of all inputs: each branch reads dout itself, its gate is in its lse."""
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = inputs
    outs = (branches.out_cmp, branches.out_slc, branches.out_win)
    lses = (branches.lse_cmp, branches.lse_slc, branches.lse_win)
    dgates, lses, deltas = mix_backward(dout, outs, lses, gates)
    span = compressed_span(cu_seqlens, config)
    dq_cmp, dk_cmp, dv_cmp = span_gradients(
        dout, q, k_cmp, v_cmp, lses[0], deltas[0], cu_seqlens, span, scale
    )
    span = sliding_span(cu_seqlens, config)
    dq_win, dk_win, dv_win = span_gradients(
        dout, q, k_win, v_win, lses[2], deltas[2], cu_seqlens, span, scale
    )
    given = (dout, q, k_slc, v_slc, lses[1], deltas[1])
    if config.sees_all(q.shape[0]):
        dq, dk_slc, dv_slc = span_gradients(*given, cu_seqlens, full_span(cu_seqlens), scale)
        dq += dq_cmp + dq_win
    else:
        dq, dk_slc, dv_slc = selected_gradients(
            *given, branches.blocks, cu_seqlens, config, scale, other_dq=(dq_cmp, dq_win)
        )
    return Inputs(dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win, dgates)
