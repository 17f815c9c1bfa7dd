"""A linear layer whose weight stays as it is, with a low-rank change beside it.

Source: arXiv 2106.09685, section 4.1.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nsa_platform.model.partition import WHOLE, Axis


def is_adapted(model: nn.Module) -> bool:
    """Whether any layer of the model has an adapter."""
    return any(isinstance(module, LoraLinear) for module in model.modules())


class LoraLinear(nn.Linear):
    """y = W x + b + (alpha / rank) B A x, where W and b are frozen.

    A weight that holds several projections, its sections, has an A and a B for each of them:
    lora_A [sections * rank, inputs], lora_B [outputs, rank].
    """

    def __init__(
        self,
        linear: nn.Linear,
        sections: Sequence[int],
        *,
        rank: int,
        alpha: float,
        dropout: float,
    ) -> None:
        """Take the place of `linear`; the adapters are undefined until somebody fills them.

        Args:
            sections: outputs of each projection, in their order.
        """
        outputs, inputs = linear.weight.shape
        if sum(sections) != outputs:
            raise ValueError(f"sections={list(sections)} must add up to the {outputs} outputs")
        # Without weights of its own: it has those of the other.
        with torch.device("meta"):
            super().__init__(inputs, outputs, bias=linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        self.sections = tuple(sections)
        self.rank, self.scale, self.dropout = rank, alpha / rank, dropout
        new = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(len(sections) * rank, inputs, **new))
        self.lora_B = nn.Parameter(torch.empty(outputs, rank, **new))

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x [T, inputs] -> [T, outputs]."""
        return super().forward(x) + self.change(x)

    def change(self, x: Tensor, axis: Axis = WHOLE.tensor) -> Tensor:
        """What the adapters add to this worker's outputs, its part of each section."""
        low = nn.functional.linear(self._dropped(x), self.lora_A).split(self.rank, dim=1)
        up = self.lora_B.split(self.sections)
        parts = [
            nn.functional.linear(rows, part[axis.own(len(part))])
            for rows, part in zip(low, up, strict=True)
        ]
        return self.scale * torch.cat(parts, dim=1)

    def change_by_own_inputs(self, x: Tensor, axis: Axis) -> Tensor:
        """This worker's part of the sum that the adapters add, from its part of the inputs."""
        down = self.lora_A[:, axis.own(self.lora_A.shape[1])]
        low = nn.functional.linear(self._dropped(x), down)
        return self.scale * nn.functional.linear(low, self.lora_B)

    def merged(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight of the plain linear layer that computes the same.

        Args:
            tensors: `weight`, `lora_A` and `lora_B`, whole.
        """
        down, up = tensors["lora_A"].split(self.rank), tensors["lora_B"].split(self.sections)
        change = torch.cat([b @ a for a, b in zip(down, up, strict=True)])
        return tensors["weight"] + self.scale * change

    def _dropped(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self.training) if self.dropout else x
