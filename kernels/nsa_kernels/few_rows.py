"""Linear layers on few rows, as a decode step has them, with what lies before and behind in one
launch: the norm of the input, bias, sigmoid or SwiGLU, the residual stream.

With few rows a linear layer costs what reading its weights costs; launches and passes over small
tensors between two of them cost as much again. Not differentiable.
"""

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from nsa_kernels import checks
from nsa_kernels.dispatch import Backend, backend_module, resolve_backend
from nsa_kernels.projections import Activation, Projection, RmsNorm

MOST_ROWS = 64
"""Up to so many rows the Triton backend has a kernel; more go through torch's matrix product."""
MOST_PROJECTIONS = 3
NUM_TALLIES = 128
"""Of a call's tallies."""


def new_tallies(device: torch.device | str) -> Tensor:
    """Tallies for project, int32 [NUM_TALLIES]: zeros before a call and after it."""
    return torch.zeros(NUM_TALLIES, dtype=torch.int32, device=device)


@torch.no_grad()
def project(
    x: Tensor,
    projections: Sequence[Projection],
    *,
    norm: RmsNorm | None = None,
    residual: Tensor | None = None,
    tallies: Tensor | None = None,
    backend: Backend | None = None,
) -> list[Tensor]:
    """Each projection of x, or of its norm: activation(norm(x) weight^T + bias) + residual.

    In the Triton backend up to 64 rows take one launch, in which a row's result does not depend on
    what the rows beside it hold, sums are fp32 and nothing between is rounded. It may read weights
    while the launch before it still runs: work that changes them must have ended.

    Args:
        x: [T, D].
        projections: one to three; swiglu only alone.
        norm: of x, before them.
        residual: [T, N], added to the result of a single projection.
        tallies: of new_tallies, for one call after the other, on one stream: programs can share the
            outputs of a narrow layer then, and its weights come faster. None: they do not.
        backend: "triton" or "torch"; None leaves it to the device (see dispatch.py).

    Returns:
        [T, N] of each projection, N / 2 for swiglu, in x's dtype.

    Raises:
        ValueError: shapes do not fit together, or the backend cannot run.
    """
    checks.check_shape("x", x, "[T, D]", (None, None))
    checks.check_dtype("x", x)
    _check_projections(x, projections)
    if norm is not None:
        if not isinstance(norm, RmsNorm):
            raise ValueError(f"norm must be an RmsNorm, got {type(norm).__name__}")
        if not (isinstance(norm.eps, float | int) and 0 <= norm.eps < math.inf):
            raise ValueError(f"norm.eps={norm.eps} must be a number from 0 on")
        checks.check_shape("norm.weight", norm.weight, "[D]", (x.shape[1],))
        _check_like("norm.weight", norm.weight, x)
    if residual is not None:
        if len(projections) > 1:
            raise ValueError(f"residual needs a single projection, got {len(projections)}")
        checks.check_shape("residual", residual, "[T, N]", (len(x), projections[0].width))
        _check_like("residual", residual, x)
    if tallies is not None:
        _check_tallies(tallies, x)
    chosen = resolve_backend(x, backend)
    if chosen == "triton" and x.dtype == torch.float64:
        raise ValueError("the triton backend takes no float64, backend='torch' does")
    # With many rows it is the product that costs, which torch's library does best.
    run = backend_module("torch" if len(x) > MOST_ROWS else chosen).project
    return run(x, projections, norm, residual, tallies)


def _check_tallies(tallies: Tensor, x: Tensor) -> None:
    if not isinstance(tallies, Tensor):
        raise ValueError(f"tallies must be a torch.Tensor, got {type(tallies).__name__}")
    wanted, got = (torch.int32, (NUM_TALLIES,), x.device), (tallies.dtype, tuple(tallies.shape))
    if (*got, tallies.device) != wanted:
        raise ValueError(
            f"tallies must be int32 [{NUM_TALLIES}] on {x.device}, as new_tallies makes them, got "
            f"{got[0]} {list(got[1])} on {tallies.device}"
        )
    if not tallies.is_contiguous():
        raise ValueError("tallies must be contiguous, as new_tallies makes them")
    if tallies.device.type == "cpu" and tallies.any():
        raise ValueError("tallies must be zeros: give each stream its own new_tallies")


def _check_projections(x: Tensor, projections: Sequence[Projection]) -> None:
    given = projections if isinstance(projections, list | tuple) else [projections]
    kinds = ", ".join(type(one).__name__ for one in given)
    if given is not projections or not all(isinstance(one, Projection) for one in given):
        raise ValueError(f"projections must be a list of Projection, got {kinds}")
    if not 1 <= len(projections) <= MOST_PROJECTIONS:
        raise ValueError(f"projections must be one to three, got {len(projections)}")
    for index, projection in enumerate(projections):
        name, kind = f"projections[{index}]", projection.activation
        if kind not in get_args(Activation):
            raise ValueError(f"{name}.activation={kind!r} is not one of {get_args(Activation)}")
        checks.check_shape(f"{name}.weight", projection.weight, "[N, D]", (None, x.shape[1]))
        _check_like(f"{name}.weight", projection.weight, x)
        count = len(projection.weight)
        if projection.bias is not None:
            checks.check_shape(f"{name}.bias", projection.bias, "[N]", (count,))
            _check_like(f"{name}.bias", projection.bias, x)
        if kind == "swiglu" and (len(projections) > 1 or count % 2):
            raise ValueError(
                f"{name}: swiglu needs an even number of rows and no other projection beside it, "
                f"got {count} rows and {len(projections)} projections"
            )


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    """The tensor shares x's dtype and device, and its rows lie side by side."""
    if (tensor.dtype, tensor.device) != (x.dtype, x.device):
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}, x is {x.dtype} on {x.device}: "
            "they must be the same"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
