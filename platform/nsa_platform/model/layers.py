"""Linear layers that workers share, and SwiGLU, the dense feed-forward of a layer."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from nsa_kernels import Projection, RmsNorm, project
from nsa_platform.model.exchange import summed, total
from nsa_platform.model.lora import LoraLinear
from nsa_platform.model.partition import WHOLE, Axis, Partition


def own_outputs(linear: nn.Linear, x: Tensor, sections: Sequence[int], axis: Axis) -> Tensor:
    """This worker's outputs of a linear layer: of each section of them its own part.

    Args:
        x: [T, D], the same on all workers of the axis.
        sections: how many outputs belong together, in their order; all of them in all.
    """
    if axis.size == 1:
        return linear(x)
    weights = [part[axis.own(len(part))] for part in linear.weight.split(list(sections))]
    bias = None
    if linear.bias is not None:
        bias = torch.cat([part[axis.own(len(part))] for part in linear.bias.split(list(sections))])
    out = nn.functional.linear(x, torch.cat(weights), bias)
    return out + linear.change(x, axis) if isinstance(linear, LoraLinear) else out


def from_own_inputs(linear: nn.Linear, x: Tensor, axis: Axis) -> Tensor:
    """A linear layer without bias whose inputs the workers of the axis share: x [T, own part]."""
    if axis.size == 1:
        return linear(x)
    weight = linear.weight[:, axis.own(linear.weight.shape[1])]
    part = nn.functional.linear(x, weight)
    if isinstance(linear, LoraLinear):
        part = part + linear.change_by_own_inputs(x, axis)
    return summed(part, axis)


def projection(linear: nn.Linear) -> Projection:
    """A linear layer as the op for few rows takes it."""
    assert not isinstance(linear, LoraLinear), "adapters are merged before a model serves"
    return Projection(linear.weight, linear.bias)


def rms_norm(norm: nn.RMSNorm) -> RmsNorm:
    """A norm as the op for few rows takes it."""
    assert norm.eps is not None
    return RmsNorm(norm.weight, norm.eps)


class RowParallelLinear(nn.Linear):
    """A linear layer without bias of whose inputs each rank has some: x [..., own inputs] ->
    [..., D], summed over ranks."""

    def __init__(self, own_inputs: int, width: int, axis: Axis) -> None:
        super().__init__(own_inputs, width, bias=False)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return total(nn.functional.linear(x, self.weight), self.axis)


def added(linear: nn.Linear, x: Tensor, residual: Tensor, tallies: Tensor) -> Tensor:
    """residual + linear(x), [T, D], for few rows. Where ranks share its inputs, the first one's
    part of the sum has the residual.

    tallies: as the op for few rows takes them.
    """
    if not isinstance(linear, RowParallelLinear):
        return project(x, [projection(linear)], residual=residual, tallies=tallies)[0]
    own = residual if linear.axis.rank == 0 else None
    (part,) = project(x, [projection(linear)], residual=own, tallies=tallies)
    return total(part, linear.axis)


class SwiGlu(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up as one projection."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.hidden_width = hidden_width
        self.gate_up = nn.Linear(width, 2 * hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, width, bias=False)

    def forward(self, x: Tensor, partition: Partition = WHOLE) -> Tensor:
        """x [T, D] -> [T, D]."""
        tensor = partition.tensor
        both = own_outputs(self.gate_up, x, [self.hidden_width] * 2, tensor)
        gate, up = both.chunk(2, dim=-1)
        return from_own_inputs(self.down, nn.functional.silu(gate) * up, tensor)

    def added_to(self, x: Tensor, norm: nn.RMSNorm, tallies: Tensor) -> Tensor:
        """x + forward(norm(x)), x [T, D], as few new tokens want it: two launches."""
        gate_up = replace(projection(self.gate_up), activation="swiglu")
        (hidden,) = project(x, [gate_up], norm=rms_norm(norm), tallies=tallies)
        return added(self.down, hidden, x, tallies)
