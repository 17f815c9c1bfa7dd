"""DeepSeekMoE feed-forward: shared experts for every token, the top-k of many small ones for each.

No token is dropped. Pairs of (token, expert) are sorted by expert, so that each expert is one
matrix product, and are put back by the inverse permutation: the result does not depend on the
order of threads. The group sizes travel to the host once for each layer.

Source: arXiv 2401.06066, sections 3.1 and 3.2 (shared experts), 3.3 (expert-level balance loss).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nsa_platform.config.model import MoeConfig
from nsa_platform.model.layers import SwiGlu

_Experts = Callable[["MoeFeedForward", Tensor, Tensor], Tensor]


class MoeFeedForward(nn.Module):
    """Routed and shared SwiGLU experts."""

    def __init__(self, width: int, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        experts, hidden_width = config.routed_experts, config.expert_width
        self.router = nn.Linear(width, experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, width, 2 * hidden_width))
        self.down = nn.Parameter(torch.empty(experts, hidden_width, width))
        # Group sizes are data: a compiled version would be made anew for each. Said here, not at
        # the function: it imports the compiler, for which models without experts have no use.
        self._run_experts: _Experts = torch.compiler.disable(_run_experts)  # pyright: ignore
        self.shared = (
            SwiGlu(width, config.shared_experts * hidden_width) if config.shared_experts else None
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D] -> output [T, D] and this layer's weighted balance loss, a scalar."""
        weights, experts, balance_loss = self._route(x)
        order = experts.flatten().argsort(stable=True)
        pairs = x[:, None].expand(-1, self.config.experts_per_token, -1).flatten(0, 1)[order]
        outputs = self._run_experts(self, pairs, experts)
        chosen = outputs[order.argsort()].unflatten(0, experts.shape)  # [T, top-k, D]
        mixed = (chosen * weights[..., None].to(chosen.dtype)).sum(1).to(x.dtype)
        if self.shared is not None:
            mixed = mixed + self.shared(x)
        return mixed, balance_loss

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights and experts [T, top-k], and the balance loss; all in fp32 at least."""
        config = self.config
        precise = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = nn.functional.linear(x.to(precise), self.router.weight.to(precise))
        probabilities = logits.softmax(-1)
        weights, experts = probabilities.topk(config.experts_per_token, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)

        # f_i: how often expert i is chosen, 1 when all are chosen equally often. P_i: its mean
        # probability. The gradient flows through P alone, counts have none.
        is_chosen = torch.zeros_like(probabilities).scatter_(1, experts, 1.0)
        frequency = is_chosen.mean(0) * (config.routed_experts / config.experts_per_token)
        balance_loss = config.balance_loss * (frequency * probabilities.mean(0)).sum()
        return weights, experts, balance_loss

    def expert(self, index: int, x: Tensor) -> Tensor:
        """Output [T, D] of one routed expert for x [T, D]."""
        gate, up = (x @ self.gate_up[index]).chunk(2, dim=-1)
        return (nn.functional.silu(gate) * up) @ self.down[index]


def _run_experts(layer: MoeFeedForward, pairs: Tensor, experts: Tensor) -> Tensor:
    """Outputs of pairs [T * top-k, D] that are sorted by expert."""
    sizes = experts.flatten().bincount(minlength=layer.config.routed_experts).tolist()
    parts = enumerate(pairs.split(sizes))
    return torch.cat([layer.expert(index, part) for index, part in parts if len(part)])
