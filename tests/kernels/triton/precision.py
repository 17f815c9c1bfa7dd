"""How exact a gradient in bf16 is, and can be."""

import torch
from torch import Tensor


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """L2 norm of the difference over that of the exact value."""
    return float((actual.double() - exact).norm() / exact.norm())


# Public kernels that scale in fp32 after the dot reach 0.5 to 0.7 % in bf16; one that scales q in
# bf16 before it reaches 6.2 % at a deviation of 60.
MAX_DQ_ERROR = 0.007


def dq_of(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, visible: Tensor, *, bf16: bool) -> Tensor:
    """Gradient of q [T, R, K] of one group, written out; `bf16` rounds where a tensor core or the
    stored output does: probabilities, output, gradient of the scores."""

    def rounded(x: Tensor) -> Tensor:
        return x.bfloat16().to(x.dtype) if bf16 else x

    scale = q.shape[-1] ** -0.5
    logits = torch.einsum("thk,sk->ths", q, k) * scale
    weights = logits.masked_fill(~visible[:, None], -1e30).softmax(-1)
    weights = weights * visible.any(-1)[:, None, None]
    out = rounded(torch.einsum("ths,sv->thv", rounded(weights), v))
    dweights = torch.einsum("thv,sv->ths", dout, v)
    delta = (dout * out).sum(-1, keepdim=True)
    return torch.einsum("ths,sk->thk", rounded(weights * (dweights - delta)), k) * scale


def assert_precise_dq(
    dq: Tensor,
    given: tuple[Tensor, Tensor, Tensor, Tensor],
    visible: Tensor,
    deviation: float,
) -> None:
    """dq [T, R, K] in bf16 of q, k, v and dout of one group, whose logits deviate so much.

    At 60 the rounding of probabilities and output alone may cost more than MAX_DQ_ERROR: what it
    costs is the bound then.
    """
    exact = dq_of(*(x.double() for x in given), visible=visible, bf16=False)
    attainable = dq_of(*(x.float() for x in given), visible=visible, bf16=True).bfloat16()
    bound = relative_error(attainable, exact) if deviation == 60.0 else MAX_DQ_ERROR
    assert relative_error(dq, exact) <= bound
