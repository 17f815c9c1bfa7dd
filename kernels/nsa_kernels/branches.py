"""What the whole op takes, and what it keeps of its three branches between its passes."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The differentiable inputs of the whole op in its order, or their gradients."""

    q: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
    gates: Tensor


class Branches(NamedTuple):
    """Outputs [T, H, V] and natural lse [T, H] of the branches, and the chosen blocks."""

    out_cmp: Tensor
    lse_cmp: Tensor
    out_slc: Tensor
    lse_slc: Tensor
    out_win: Tensor
    lse_win: Tensor
    blocks: Tensor
    """int32 [T, G, n]; no row where every block is seen and none was chosen."""
