"""The whole op: three branches mixed by their gates (Eq. 5), forward and backward."""

import torch
from torch import Tensor

from nsa_kernels.branches import Branches, Inputs
from nsa_kernels.shapes import NsaConfig
from nsa_kernels.torch_backend.mixing import mix_backward, mix_forward
from nsa_kernels.torch_backend.selected import selected_backward, selected_forward
from nsa_kernels.torch_backend.selection import select_blocks
from nsa_kernels.torch_backend.span import (
    compressed_backward,
    compressed_forward,
    full_backward,
    full_forward,
    sliding_backward,
    sliding_forward,
)


def nsa_forward(
    inputs: Inputs, cu_seqlens: Tensor, config: NsaConfig, scale: float
) -> tuple[Tensor, Branches]:
    """out [T, H, V] and what the backward pass needs of the branches."""
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = inputs
    out_cmp, lse_cmp = compressed_forward(q, k_cmp, v_cmp, cu_seqlens, config, scale)
    if config.sees_all(q.shape[0]):
        blocks = cu_seqlens.new_empty(0, k_slc.shape[1], config.num_selected_blocks)
        out_slc, lse_slc = full_forward(q, k_slc, v_slc, cu_seqlens, scale)
    else:
        blocks = select_blocks(q, k_cmp, lse_cmp, cu_seqlens, config, scale)
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
    """Gradients of all inputs, branch by branch."""
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = inputs
    outs = (branches.out_cmp, branches.out_slc, branches.out_win)
    dout_cmp, dout_slc, dout_win, dgates = mix_backward(dout, *outs, gates)
    dlse = torch.zeros_like(branches.lse_cmp)
    saved = (branches.out_cmp, branches.lse_cmp, cu_seqlens, config, scale)
    dq_cmp, dk_cmp, dv_cmp = compressed_backward(dout_cmp, dlse, q, k_cmp, v_cmp, *saved)
    saved = (branches.out_win, branches.lse_win, cu_seqlens, config, scale)
    dq_win, dk_win, dv_win = sliding_backward(dout_win, dlse, q, k_win, v_win, *saved)
    given = (dout_slc, dlse, q, k_slc, v_slc, branches.out_slc, branches.lse_slc)
    if config.sees_all(q.shape[0]):
        dq_slc, dk_slc, dv_slc = full_backward(*given, cu_seqlens, scale)
    else:
        dq_slc, dk_slc, dv_slc = selected_backward(
            *given, branches.blocks, cu_seqlens, config, scale
        )
    dq = dq_cmp + dq_slc + dq_win
    return Inputs(dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win, dgates)
