"""Routed experts as grouped matrix products, of one worker or spread over several.

Rows come sorted by expert. Where workers share the experts, rows travel to the worker that has
theirs and their results travel back; how many is told to the host first, once for each pass.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nsa_platform.config.model import MoeConfig
from nsa_platform.model.exchange import exchanged
from nsa_platform.model.partition import Axis


class Experts(nn.Module):
    """SwiGLU experts, stacked; each parameter has one entry on axis 0 for each expert."""

    def __init__(self, width: int, config: MoeConfig) -> None:
        super().__init__()
        experts, hidden_width = config.routed_experts, config.expert_width
        self.gate_up = nn.Parameter(torch.empty(experts, width, 2 * hidden_width))
        self.down = nn.Parameter(torch.empty(experts, hidden_width, width))

    def forward(self, rows: Tensor, counts: Tensor, axis: Axis) -> Tensor:
        """Outputs [M, D] of rows [M, D] that are sorted by expert.

        Args:
            counts: int64 [experts], rows of each expert.
            axis: the workers that share the experts; each has as many, in order.
        """
        if axis.size == 1:
            return self._products(rows, counts)
        by_worker = counts.unflatten(0, (axis.size, -1))  # [workers, own experts]
        coming = exchanged(by_worker, axis)
        sent, received = by_worker.sum(1).tolist(), coming.sum(1).tolist()
        rows = exchanged(rows, axis, received=received, sent=sent)
        # They come by worker, then by expert.
        own = torch.arange(coming.shape[1], device=rows.device).repeat(axis.size)
        order = own.repeat_interleave(coming.flatten()).argsort(stable=True)
        outputs = self._products(rows[order], coming.sum(0))
        return exchanged(outputs[order.argsort()], axis, received=sent, sent=received)

    def _products(self, rows: Tensor, counts: Tensor) -> Tensor:
        product = grouped_product if has_grouped_product(rows) else product_by_product
        gate, up = product(rows, _own(self.gate_up), counts).chunk(2, dim=-1)
        return product(nn.functional.silu(gate) * up, _own(self.down), counts)


def has_grouped_product(rows: Tensor) -> bool:
    """Whether the device has one kernel for all groups: bfloat16 on Hopper and later."""
    return (
        rows.device.type == "cuda"
        and torch.version.hip is None
        and rows.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(rows.device) >= (9, 0)
    )


def grouped_product(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """rows [M, D], `counts` of them in each group, times weights [groups, D, E]: [M, E]."""
    ends = counts.cumsum(0, dtype=torch.int32)
    return nn.functional.grouped_mm(rows, weights, offs=ends)


def product_by_product(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """The same, one product for each group, also for those without rows; reads the counts."""
    parts = zip(rows.split(counts.tolist()), weights.unbind(0), strict=True)
    return torch.cat([part @ weight for part, weight in parts])


def _own(parameter: Tensor) -> Tensor:
    """What this worker has of a parameter that is spread over the axis of experts."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
