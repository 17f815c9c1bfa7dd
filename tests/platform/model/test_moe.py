"""Mixture of experts, against a loop over tokens."""

import pytest
import torch

from nsa_platform.config.model import MoeConfig
from nsa_platform.model.experts import grouped_product, product_by_product
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
    output, balance_loss, load = moe(x)
    counts, mass = torch.zeros(6), torch.zeros(6, dtype=torch.float64)
    for t in range(23):
        probabilities = (moe.router.weight @ x[t]).softmax(-1)
        mass += probabilities / 23
        chosen = probabilities.argsort(descending=True)[:2]
        counts[chosen] += 1
        wanted = sum(
            probabilities[e]
            / probabilities[chosen].sum()
            * swiglu(x[t], moe.experts.gate_up[e], moe.experts.down[e])
            for e in chosen.tolist()
        )
        if moe.shared is not None:
            wanted = wanted + swiglu(x[t], moe.shared.gate_up.weight.T, moe.shared.down.weight.T)
        torch.testing.assert_close(output[t], wanted)
    assert load.tolist() == counts.tolist()
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
    assert moe.experts.gate_up.grad is not None
    used = moe.experts.gate_up.grad.flatten(1).abs().sum(1) > 0
    assert used.tolist() == [True, True, False, False, False, False]


def test_two_runs_are_bit_identical():
    moe = make_moe().float()
    x = torch.randn(64, 12)
    assert torch.equal(moe(x)[0], moe(x)[0])


def steered(rate: float) -> tuple[MoeFeedForward, torch.Tensor]:
    moe = make_moe(bias_update_rate=rate)
    assert moe.balance_bias is not None
    with torch.no_grad():
        return moe, moe.balance_bias.zero_()


def test_the_bias_moves_towards_idle_experts_and_weighs_nothing():
    moe, bias = steered(0.25)
    x = torch.randn(50, 12, dtype=torch.float64)
    output, _, load = moe(x)
    moe.steer(torch.tensor([10, 0, 4, 4, 4, 2]))
    assert bias.tolist() == [-0.25, 0.25, 0.0, 0.0, 0.0, 0.25]
    with torch.no_grad():
        bias.fill_(7.0)
    assert torch.equal(moe(x)[0], output), "a bias that all share changes no choice and no weight"
    with torch.no_grad():
        bias[3] = 100.0
    assert load[3] < moe(x)[2][3] == 50


def test_the_bias_evens_out_the_load():
    moe, _ = steered(0.005)
    x = torch.randn(600, 12, dtype=torch.float64) + 0.5
    loads = []
    for _ in range(80):
        loads.append(moe(x)[2])
        moe.steer(loads[-1])
    first, last = (load.max() / load.double().mean() for load in (loads[0], loads[-1]))
    assert first > 1.3
    assert last < 1.1


def test_a_layer_without_bias_has_none_to_move():
    with pytest.raises(ValueError, match="bias_update_rate=0"):
        make_moe().steer(torch.ones(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_are_products_one_by_one(dtype):
    torch.manual_seed(0)
    rows = torch.randn(11, 16, dtype=dtype, requires_grad=True)
    weights = torch.randn(4, 16, 8, dtype=dtype, requires_grad=True)
    counts = torch.tensor([3, 0, 6, 2])
    upstream = torch.randn(11, 8, dtype=dtype)
    found = []
    for product in (grouped_product, product_by_product):
        out = product(rows, weights, counts)
        found.append((out, *torch.autograd.grad(out, [rows, weights], upstream)))
    for grouped, single in zip(*found, strict=True):
        torch.testing.assert_close(grouped, single)
