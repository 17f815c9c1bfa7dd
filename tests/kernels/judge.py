"""Judges an op by its twin in the reference: same values in, outputs and gradients compared."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import nsa_kernels
from nsa_kernels import reference
from tests.kernels.cases import Inputs, Target, assert_close

OPS = ("compressed", "selected", "sliding", "full", "nsa")


@dataclass(frozen=True)
class Result:
    """What an op returned, and the gradients of its inputs, by name."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def op_inputs(op: str, inputs: Inputs) -> dict[str, Tensor]:
    """The differentiable tensors that the op takes, by the names of its arguments."""
    if op == "compressed":
        return {"q": inputs.q, "k_cmp": inputs.k_cmp, "v_cmp": inputs.v_cmp}
    if op == "selected":
        return {"q": inputs.q, "k": inputs.k_slc, "v": inputs.v_slc}
    if op in ("sliding", "full"):
        return {"q": inputs.q, "k": inputs.k_win, "v": inputs.v_win}
    names = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
    return dict(zip(names, inputs.tensors, strict=True))


def call(
    module: ModuleType, op: str, inputs: Inputs, blocks: Tensor | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """Call module's op (nsa_kernels or its reference) on these inputs; outputs as a tuple."""
    tensors = op_inputs(op, inputs)
    if op == "selected":
        assert blocks is not None
        tensors["block_indices"] = blocks
    if op != "full":
        options["config"] = inputs.config
    result = getattr(module, f"{op}_attention")(**tensors, cu_seqlens=inputs.cu_seqlens, **options)
    return result if isinstance(result, tuple) else (result,)


def reference_blocks(inputs: Inputs) -> Tensor:
    """The blocks that the float64 reference selects, on the inputs' device."""
    exact = inputs.double()
    _, lse = call(reference, "compressed", exact)
    blocks = reference.select_blocks(
        exact.q, exact.k_cmp, lse, config=exact.config, cu_seqlens=exact.cu_seqlens
    )
    return blocks.to(inputs.q.device)


def _cotangents(outputs: tuple[Tensor, ...], seed: int = 1) -> list[Tensor]:
    """Random gradients of the outputs, drawn in float64; the lse's are small beside out's."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(output.shape, generator=generator, dtype=torch.float64) for output in outputs
    ]


def differentiate(
    module: ModuleType, op: str, inputs: Inputs, blocks: Tensor | None = None, **options: Any
) -> Result:
    """Run the op, and its backward pass with fixed random gradients of every output."""
    tensors = op_inputs(op, inputs)
    for tensor in tensors.values():
        tensor.requires_grad_(True)
    outputs = call(module, op, inputs, blocks, **options)
    upstream = [
        cotangent.to(output.device, output.dtype)
        for cotangent, output in zip(_cotangents(outputs), outputs, strict=True)
    ]
    gradients = torch.autograd.grad(outputs, list(tensors.values()), upstream)
    return Result(
        outputs=dict(zip(("out", "lse"), outputs, strict=False)),
        gradients=dict(zip(tensors, gradients, strict=True)),
    )


def judge(op: str, inputs: Inputs, target: Target, *, slack: float = 1.0) -> None:
    """Assert that outputs and gradients agree with the float64 reference.

    The gradients' upstream values are rounded to the op's dtype before they reach the reference,
    so that only the op's own arithmetic is judged.
    """
    blocks = reference_blocks(inputs) if op == "selected" else None
    actual = differentiate(nsa_kernels, op, inputs, blocks, backend=target.backend)
    exact = inputs.double()
    blocks = None if blocks is None else blocks.cpu()
    tensors = op_inputs(op, exact)
    for tensor in tensors.values():
        tensor.requires_grad_(True)
    outputs = call(reference, op, exact, blocks)
    upstream = [
        cotangent.to(output.dtype).double()
        for cotangent, output in zip(_cotangents(outputs), actual.outputs.values(), strict=True)
    ]
    gradients = torch.autograd.grad(outputs, list(tensors.values()), upstream)
    for name, output in zip(actual.outputs, outputs, strict=True):
        assert_close(actual.outputs[name], output, f"{op} {name}", slack=slack)
    for name, gradient in zip(tensors, gradients, strict=True):
        assert_close(actual.gradients[name], gradient, f"{op} d{name}", slack=slack)
