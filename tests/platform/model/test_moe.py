"""Mixture of experts, against a loop over tokens."""

import pytest
import torch

from nsa_platform.config.model import MoeConfig
from nsa_platform.model.moe import MoeFeedForward


def swiglu(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ gate_up).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ down


def make_moe(**fields) -> MoeFeedForward:
    config = MoeConfig(routed_experts=6, experts_per_token=2, expert_width=10).model_copy(
        update=fields
    )
    torch.manual_seed(0)
    moe = MoeFeedForward(12, config)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe.double()


@pytest.mark.parametrize("shared", [0, 2])
def test_equals_a_loop_over_tokens(shared):
    moe = make_moe(shared_experts=shared)
    x = torch.randn(23, 12, dtype=torch.float64)
    output, balance_loss = moe(x)
    counts, mass = torch.zeros(6), torch.zeros(6, dtype=torch.float64)
    for t in range(23):
        probabilities = (moe.router.weight @ x[t]).softmax(-1)
        mass += probabilities / 23
        chosen = probabilities.argsort(descending=True)[:2]
        counts[chosen] += 1
        wanted = sum(
            probabilities[e]
            / probabilities[chosen].sum()
            * swiglu(x[t], moe.gate_up[e], moe.down[e])
            for e in chosen.tolist()
        )
        if moe.shared is not None:
            wanted = wanted + swiglu(x[t], moe.shared.gate_up.weight.T, moe.shared.down.weight.T)
        torch.testing.assert_close(output[t], wanted)
    frequency = counts.double() * 6 / (2 * 23)
    torch.testing.assert_close(balance_loss, 0.001 * (frequency * mass).sum())


def test_balance_loss_is_least_when_experts_share_the_work():
    moe = make_moe(balance_loss=1.0)
    x = torch.rand(500, 12, dtype=torch.float64)
    with torch.no_grad():
        moe.router.weight.zero_()
        assert float(moe(x)[1]) == pytest.approx(1.0)
        moe.router.weight[0] = 1.0
        assert float(moe(x)[1]) > 2.0


def test_balance_loss_trains_the_router_alone():
    moe = make_moe()
    moe(torch.randn(40, 12, dtype=torch.float64))[1].backward()
    trained = {name for name, parameter in moe.named_parameters() if parameter.grad is not None}
    assert trained == {"router.weight"}


def test_an_expert_without_tokens_gets_a_zero_gradient():
    moe = make_moe()
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[:2, 0] = 50.0
    x = torch.rand(9, 12, dtype=torch.float64) + 0.5
    moe(x)[0].sum().backward()
    assert moe.gate_up.grad is not None
    used = moe.gate_up.grad.flatten(1).abs().sum(1) > 0
    assert used.tolist() == [True, True, False, False, False, False]


def test_two_runs_are_bit_identical():
    moe = make_moe().float()
    x = torch.randn(64, 12)
    assert torch.equal(moe(x)[0], moe(x)[0])
