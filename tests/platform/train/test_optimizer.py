"""Which parameters decay."""

import pytest
import torch

from nsa_platform.config.train import OptimizerConfig
from nsa_platform.model.transformer import Transformer
from nsa_platform.train.optimizer import build_optimizer, decays, set_learning_rate
from tests.platform.train.tiny_run import MOE


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embedding.weight", False),
        ("norm.weight", False),
        ("head.weight", True),
        ("layers.0.attention_norm.weight", False),
        ("layers.0.attention.query.weight", True),
        ("layers.0.attention.key_value.weight", True),
        ("layers.0.attention.output.weight", True),
        ("layers.0.attention.gate.weight", False),
        ("layers.0.attention.gate.bias", False),
        ("layers.0.attention.compress_key.position", False),
        ("layers.0.attention.compress_key.fold", True),
        ("layers.0.ffn.gate_up.weight", True),
        ("layers.1.ffn.experts.gate_up", True),
        ("layers.1.ffn.router.weight", True),
    ],
)
def test_decay_by_name(name: str, expected: bool) -> None:
    assert decays(name) == expected


def test_every_parameter_is_in_one_group() -> None:
    model = Transformer(MOE)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3, beta2=0.9))
    groups = [
        ({id(p) for p in group["params"]}, group["weight_decay"])
        for group in optimizer.param_groups
    ]
    assert [decay for _, decay in groups] == [0.3, 0.0]
    assert not groups[0][0] & groups[1][0]
    assert groups[0][0] | groups[1][0] == {id(p) for p in model.parameters()}
    assert id(model.embedding.weight) in groups[1][0]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.9)


def test_only_decaying_parameters_shrink_without_a_gradient() -> None:
    model = Transformer(MOE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.5))
    set_learning_rate(optimizer, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, torch.tensor(0.95 if decays(name) else 1.0)), name
