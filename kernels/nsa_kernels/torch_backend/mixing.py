"""The gated sum of the branches (Eq. 5) and its gradients in plain torch."""

import torch
from torch import Tensor

from nsa_kernels.checks import accumulation_dtype


def mix_forward(out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, gates: Tensor) -> Tensor:
    """Sum of the branches [T, H, V] times their gates [T, H, 3], in out_cmp's dtype."""
    wide = accumulation_dtype(out_cmp.dtype)
    gate_cmp, gate_slc, gate_win = gates.to(wide).unsqueeze(-1).unbind(2)
    mixed = out_cmp.to(wide).mul(gate_cmp)
    mixed.addcmul_(out_slc.to(wide), gate_slc)
    mixed.addcmul_(out_win.to(wide), gate_win)
    return mixed.to(out_cmp.dtype)


def mix_backward(
    dout: Tensor, out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of out_cmp, out_slc, out_win and gates."""
    wide = accumulation_dtype(out_cmp.dtype)
    upstream = dout.to(wide)
    scaled = [
        upstream.mul(gate).to(out_cmp.dtype) for gate in gates.to(wide).unsqueeze(-1).unbind(2)
    ]
    dgates = [upstream.mul(out.to(wide)).sum(-1) for out in (out_cmp, out_slc, out_win)]
    return scaled[0], scaled[1], scaled[2], torch.stack(dgates, -1).to(gates.dtype)
