"""What project (few_rows.py) is told: linear layers with what follows them, and a norm."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Activation = Literal["none", "sigmoid", "swiglu"]


@dataclass(frozen=True, slots=True)
class Projection:
    """One linear layer and what follows it."""

    weight: Tensor
    """[N, D]; for swiglu the rows of the gate first, then those of up."""
    bias: Tensor | None = None
    """[N]"""
    activation: Activation = "none"
    """swiglu is silu(gate) * up."""

    @property
    def width(self) -> int:
        """Channels of the result: N, or N / 2 for swiglu."""
        return len(self.weight) // (2 if self.activation == "swiglu" else 1)


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the channels."""

    weight: Tensor
    """[D]"""
    eps: float
