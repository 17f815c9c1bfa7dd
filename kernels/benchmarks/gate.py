"""The gate: every op agrees with the float64 reference, or nothing is timed."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import nsa_kernels
from benchmarks.workloads import GATE, Choice, Tensors, Workload, make_tensors
from nsa_kernels import NsaConfig, reference

OPS = {
    "compressed": "compressed_attention",
    "selected": "selected_attention",
    "sliding": "sliding_attention",
    "full": "full_attention",
    "nsa": "nsa_attention",
}
# bf16 kernels that accumulate in fp32 reach 0.2 to 0.5 %; a wrong one is off by far more.
MAX_ERROR = 0.01


class RedGate(Exception):
    """An op disagrees with the reference. Speed means nothing then."""


def op_tensors(op: str, tensors: Tensors) -> list[Tensor]:
    """The differentiable inputs of an op, in its order."""
    if op == "compressed":
        return [tensors.q, tensors.k_cmp, tensors.v_cmp]
    if op == "selected":
        return [tensors.q, tensors.k_slc, tensors.v_slc]
    if op in ("sliding", "full"):
        return [tensors.q, tensors.k_win, tensors.v_win]
    return [
        tensors.q, tensors.k_cmp, tensors.v_cmp, tensors.k_slc, tensors.v_slc,
        tensors.k_win, tensors.v_win, tensors.gates,
    ]  # fmt: skip


def op_output(
    module: Any, op: str, inputs: list[Tensor], blocks: Tensor, config: NsaConfig
) -> Tensor:
    """out of nsa_kernels' op, or of its twin in the reference."""
    choice = [blocks] if op == "selected" else []
    options = {} if op == "full" else {"config": config}
    result = getattr(module, OPS[op])(*inputs, *choice, **options)
    return result if isinstance(result, Tensor) else result[0]


def check_gate(workloads: Iterable[Workload], device: str, gate: Workload = GATE) -> None:
    """Compare every op that is timed with the reference, on a shorter sequence.

    Each combination of op, choice of blocks, widths and heads of a group is checked once.

    Raises:
        RedGate: an output or a gradient is off by more than MAX_ERROR (relative L2).
    """
    for small, op, choice in dict.fromkeys(_cases(workloads, gate)):
        errors = _errors(small, op, choice, device)
        shape = f"{small.key_width}/{small.value_width} R={small.heads // small.groups}"
        print(f"gate {shape} {op} {choice}".ljust(40), f"{max(errors):.4f}", flush=True)
        if not max(errors) <= MAX_ERROR:
            raise RedGate(f"{op}: relative errors of out and gradients {errors} > {MAX_ERROR}")


def _cases(workloads: Iterable[Workload], gate: Workload) -> Iterator[tuple[Workload, str, Choice]]:
    for workload in workloads:
        small = replace(
            gate,
            heads=workload.heads // workload.groups * gate.groups,
            key_width=workload.key_width,
            value_width=workload.value_width,
        )
        for op in workload.ops:
            if op in OPS:
                yield small, op, "uniform"
        for op in workload.real_ops:
            yield small, op, "real"


def _errors(workload: Workload, op: str, choice: Choice, device: str) -> list[float]:
    """Relative L2 errors of the output and of every gradient."""
    tensors = make_tensors(workload, device, choice=choice)
    inputs = [t.detach().requires_grad_(True) for t in op_tensors(op, tensors)]
    exact_inputs = [t.detach().double().requires_grad_(True) for t in inputs]
    out = op_output(nsa_kernels, op, inputs, tensors.blocks, workload.config)
    exact = op_output(reference, op, exact_inputs, tensors.blocks, workload.config)
    gradients = torch.autograd.grad(out, inputs, tensors.dout)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, tensors.dout.double())
    pairs = zip((out, *gradients), (exact, *exact_gradients), strict=True)
    return [float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in pairs]
