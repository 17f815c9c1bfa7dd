"""Linear layers with what lies before and behind, each step an op of torch's."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from nsa_kernels.projections import Projection, RmsNorm


def project(
    x: Tensor,
    projections: Sequence[Projection],
    norm: RmsNorm | None,
    residual: Tensor | None,
    tallies: Tensor | None,
) -> list[Tensor]:
    """Each projection of x, or of its norm. No one shares here: tallies are left alone."""
    if norm is not None:
        x = rms_norm(x, (x.shape[1],), norm.weight, norm.eps)
    results = [_project(x, projection) for projection in projections]
    return results if residual is None else [residual + results[0]]


def _project(x: Tensor, projection: Projection) -> Tensor:
    out = linear(x, projection.weight, projection.bias)
    if projection.activation == "sigmoid":
        return out.sigmoid()
    if projection.activation == "swiglu":
        gate, up = out.chunk(2, dim=-1)
        return silu(gate) * up
    return out
