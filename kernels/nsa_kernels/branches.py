"""What the whole op keeps of its three branches between its passes."""

from typing import NamedTuple

from torch import Tensor


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


class Gradients(NamedTuple):
    """Gradients of the whole op's inputs, in its order."""

    q: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
    gates: Tensor
