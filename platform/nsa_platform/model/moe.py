"""DeepSeekMoE feed-forward: shared experts for every token, the top-k of many small ones for each.

No token is dropped. Pairs of (token, expert) are sorted by expert, so that the experts are one
grouped matrix product, and are put back by the inverse permutation: the result does not depend on
the order of threads. Balance comes from a loss, from a bias that steers the choice, or from both.

Source: arXiv 2401.06066, sections 3.1 and 3.2 (shared experts), 3.3 (expert-level balance loss);
arXiv 2408.15664 (the bias, without a loss).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nsa_platform.config.model import MoeConfig
from nsa_platform.model.exchange import joined, total
from nsa_platform.model.experts import Experts
from nsa_platform.model.layers import SwiGlu
from nsa_platform.model.partition import WHOLE, Axis, Partition

_Run = Callable[[Experts, Tensor, Tensor, Axis], Tensor]


class Routed(NamedTuple):
    """Where tokens go."""

    weights: Tensor
    """[T, top-k], sum 1 for each token."""
    experts: Tensor
    """int64 [T, top-k]."""
    balance_loss: Tensor
    """Weighted, a scalar."""
    load: Tensor
    """int64 [experts], how many of these tokens chose each."""


class MoeFeedForward(nn.Module):
    """Routed and shared SwiGLU experts."""

    def __init__(self, width: int, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(width, config.routed_experts, bias=False)
        self.experts = Experts(width, config)
        self.balance_bias = None
        if config.bias_update_rate:
            # No gradient trains it; `steer` moves it after each step.
            bias = torch.empty(config.routed_experts)
            self.balance_bias = nn.Parameter(bias, requires_grad=False)
        # Group sizes are data: a compiled version would be made anew for each. Said here, not at
        # the function: it imports the compiler, for which models without experts have no use.
        self._run_experts: _Run = torch.compiler.disable(_run_experts)  # pyright: ignore
        self.shared = (
            SwiGlu(width, config.shared_experts * config.expert_width)
            if config.shared_experts
            else None
        )

    def forward(self, x: Tensor, partition: Partition = WHOLE) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D] -> output [T, D], this layer's weighted balance loss, and its load: how many
        of this worker's tokens chose each expert, int64 [experts]."""
        routed = self._route(x, partition.context)
        # Workers with the same tokens take a part of them each.
        own = partition.tensor.own(x.shape[0])
        weights, experts = routed.weights[own], routed.experts[own]
        order = experts.flatten().argsort(stable=True)
        pairs = x[own, None].expand(-1, experts.shape[1], -1).flatten(0, 1)[order]
        counts = experts.flatten().bincount(minlength=self.config.routed_experts)
        outputs = self._run_experts(self.experts, pairs, counts, partition.expert)
        chosen = outputs[order.argsort()].unflatten(0, experts.shape)  # [T, top-k, D]
        mixed = (chosen * weights[..., None].to(chosen.dtype)).sum(1).to(x.dtype)
        mixed = joined(mixed, partition.tensor)
        if self.shared is not None:
            mixed = mixed + self.shared(x, partition)
        return mixed, routed.balance_loss, routed.load

    def _route(self, x: Tensor, context: Axis) -> Routed:
        """Experts of each token; all in fp32 at least."""
        config = self.config
        precise = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = nn.functional.linear(x.to(precise), self.router.weight.to(precise))
        probabilities = logits.softmax(-1)
        ranked = probabilities if self.balance_bias is None else probabilities + self.balance_bias
        experts = ranked.topk(config.experts_per_token, dim=-1).indices
        weights = probabilities.gather(1, experts)
        weights = weights / weights.sum(-1, keepdim=True)

        # f_i: how often expert i is chosen, 1 when all are chosen equally often; over all tokens
        # of the rows, also those of other workers. P_i: its mean probability here. The gradient
        # flows through P alone, counts have none.
        load = torch.zeros_like(probabilities, dtype=torch.int64).scatter_(1, experts, 1).sum(0)
        share = config.routed_experts / (config.experts_per_token * x.shape[0] * context.size)
        frequency = total(load, context).to(precise) * share
        balance_loss = config.balance_loss * (frequency * probabilities.mean(0)).sum()
        return Routed(weights, experts, balance_loss, load)

    @torch.no_grad()
    def steer(self, load: Tensor) -> None:
        """Move the bias by one update: up where `load` [experts] is below its mean, down above.

        Raises:
            ValueError: the config has no bias (bias_update_rate 0).
        """
        if self.balance_bias is None:
            raise ValueError("bias_update_rate=0: this layer has no bias to move")
        error = load.double().mean() - load.double()
        self.balance_bias += self.config.bias_update_rate * error.sign().to(self.balance_bias)


def _run_experts(experts: Experts, rows: Tensor, counts: Tensor, axis: Axis) -> Tensor:
    return experts(rows, counts, axis)
