"""Adapters: they start as nothing, train alone, resume bit for bit and vanish into the weights."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from nsa_platform.config.base import ConfigError
from nsa_platform.config.data import LoaderConfig
from nsa_platform.config.lora import LoraConfig
from nsa_platform.config.model import ModelConfig, MoeConfig
from nsa_platform.config.runs import PretrainRun
from nsa_platform.config.train import ClusterConfig
from nsa_platform.model.cost import flops_per_token
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.lora import LoraLinear
from nsa_platform.model.transformer import Transformer, init_weights
from nsa_platform.model.weights import export_model, load_model
from nsa_platform.train.adapters import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    count_trainable,
    merged,
    save_adapter,
    training_flops,
)
from nsa_platform.train.build import build_model
from nsa_platform.train.estimate import estimate
from nsa_platform.train.export import gather_weights
from nsa_platform.train.mesh import alone
from nsa_platform.train.optimizer import build_optimizer
from nsa_platform.train.parallel import World
from tests.platform.train.tiny_run import CONTEXT, MODEL, MOE, run, settings, write_data

pytestmark = pytest.mark.usefixtures("process_group")

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
LORA = {"rank": 3, "alpha": 6.0, "modules_to_save": ["gate", "compression"]}
ROUTED: dict[str, Any] = {"routed_experts": 4, "expert_width": 8, "experts_per_token": 2}
FULL = ModelConfig.parse(
    MOE.model_dump()
    | {
        "tie_embeddings": False,
        "attention": {
            **{"kind": "full", "gated": True, "qkv_bias": True, "query_heads": 4, "kv_heads": 2},
            **{"key_width": 8, "value_width": 4},
        },
    }
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LoaderConfig:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model whose gates and phi say something."""
    return _exported(tmp_path_factory.mktemp("start") / "model", MODEL)


def _exported(folder: Path, config: ModelConfig) -> Path:
    model = Transformer(config)
    init_weights(model, 5)
    return export_model(folder, config, model.state_dict())


def _model(start: Path, config: ModelConfig = MODEL, **lora: Any) -> Transformer:
    train = settings(lora=LORA | lora)
    return build_model(config, train, world=WORLD, mesh=alone(), weights=start)


def _hidden(model: Transformer) -> Tensor:
    ids = torch.arange(2, 2 + CONTEXT) % 30
    return model(ids, PackedInputs.from_lengths([30, CONTEXT - 30])).hidden


def _fill(model: Transformer) -> None:
    """Adapters that say something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3, generator=generator)


def test_step_zero_is_the_base_model(start: Path) -> None:
    adapted = _model(start)
    base = load_model(start)
    assert _hidden(adapted).equal(_hidden(base))
    _fill(adapted)
    assert not torch.allclose(_hidden(adapted), _hidden(base), atol=1e-2)


@pytest.mark.parametrize("config", [MODEL, MOE, FULL], ids=["nsa", "experts", "full"])
def test_the_merged_model_computes_the_same(config: ModelConfig, tmp_path: Path) -> None:
    start = _exported(tmp_path / "start", config)
    saved = () if config is FULL else ("gate",)
    adapted = _model(start, config, modules_to_save=saved).eval()
    _fill(adapted)
    plain = merged(adapted, gather_weights(adapted))
    folder = export_model(tmp_path / "merged", config, plain)
    whole = load_model(folder)
    torch.testing.assert_close(_hidden(whole), _hidden(adapted), rtol=1e-4, atol=1e-5)
    base = load_model(start).state_dict()
    changed = {name for name, value in plain.items() if not value.equal(base[name])}
    projections = ("query", "key_value", "output", "gate_up", "down")
    ends = tuple(f".{projection}.weight" for projection in projections)
    assert changed == {name for name in base if name.endswith(ends)}


def test_each_section_has_an_adapter_of_its_own() -> None:
    """By hand: two sections of one output, rank 1, alpha 2."""
    linear = torch.nn.Linear(2, 2, bias=False)
    lora = LoraLinear(linear, [1, 1], rank=1, alpha=2.0, dropout=0.0)
    with torch.no_grad():
        lora.weight.zero_()
        lora.lora_A.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        lora.lora_B.copy_(torch.tensor([[3.0], [5.0]]))
    assert lora(torch.tensor([[1.0, 10.0]])).tolist() == [[6.0, 100.0]]
    parts = {"weight": lora.weight, "lora_A": lora.lora_A, "lora_B": lora.lora_B}
    assert lora.merged(parts).tolist() == [[6.0, 0.0], [0.0, 10.0]]
    with pytest.raises(ValueError, match=r"sections=\[1\] must add up to the 2 outputs"):
        LoraLinear(linear, [1], rank=1, alpha=1.0, dropout=0.0)


def test_dropout_is_for_training_alone(start: Path) -> None:
    model = _model(start, dropout=0.5)
    _fill(model)
    assert not _hidden(model).equal(_hidden(model))
    model.eval()
    assert _hidden(model).equal(_hidden(model))


def test_the_optimizer_holds_what_is_trained(start: Path) -> None:
    model = _model(start)
    optimizer = build_optimizer(model, settings().optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in held}
    words = ("lora_A", "lora_B", ".gate.", ".compress_")
    assert names == {n for n, _ in model.named_parameters() if any(w in n for w in words)}
    trained = sum(p.numel() for p in model.parameters() if id(p) in held)
    assert count_trainable(MODEL, LoraConfig.parse(LORA)) == trained


def test_six_steps_are_three_and_three(data: LoaderConfig, start: Path, tmp_path: Path) -> None:
    # Warm-up to the end: the rate of a step then does not know how long the run is.
    changes: dict[str, Any] = {"optimizer": {"learning_rate": 1e-2, "warmup_steps": 6}}
    changes |= {"lora": LORA | {"dropout": 0.2}, "activation_checkpointing": "selective"}
    straight = run(settings(**changes), data, tmp_path / "straight", weights=start)
    place = tmp_path / "parts"
    first = run(settings(steps=3, **changes), data, place, weights=start)
    second = run(settings(**changes), data, place, weights=start)
    assert first.losses() + second.losses() == straight.losses()
    assert len(set(straight.losses())) == 6
    for name, weight in straight.weights.items():
        assert weight.equal(second.weights[name]), name
    base = load_model(start).state_dict()
    trained = {name for name in base if not straight.weights[name].equal(base[name])}
    assert trained == {name for name in base if ".gate." in name or ".compress_" in name}
    stored = FileSystemReader(place / "step-00000006").read_metadata().state_dict_metadata
    assert not [name for name in stored if "embedding" in name or name.endswith("query.weight")]
    assert "model.layers.1.attention.query.lora_B" in stored


def test_the_adapter_alone_is_what_was_trained(start: Path, tmp_path: Path) -> None:
    model = _model(start)
    _fill(model)
    save_adapter(model, str(tmp_path / "adapter"), about={"base": "b"}, world=WORLD, say=print)
    adapter = load_file(tmp_path / "adapter" / ADAPTER_FILE)
    assert adapter.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert json.loads((tmp_path / "adapter" / ADAPTER_CONFIG_FILE).read_text()) == {"base": "b"}
    again = _model(start)
    assert not again.load_state_dict(adapter, strict=False).unexpected_keys
    assert _hidden(again).equal(_hidden(model))


def test_the_plan_counts_what_is_trained() -> None:
    loader = LoaderConfig(path="unused", context_length=CONTEXT)
    full = estimate(MODEL, loader, settings(), ClusterConfig())
    plan = estimate(MODEL, loader, settings(lora=LORA), ClusterConfig())
    trained = count_trainable(MODEL, LoraConfig.parse(LORA))
    total = full.parameters.total
    assert (full.trainable, plan.trainable) == (total, trained)
    assert plan.optimizer_bytes == 8 * trained
    assert plan.state_bytes == 4 * total + 12 * trained


def test_a_frozen_weight_costs_two_products() -> None:
    """By hand: three for a trained weight, of which one is its own gradient."""
    flops = flops_per_token(FULL, CONTEXT)
    lora = LoraConfig(rank=2, target_modules=("query",), modules_to_save=("gate", "embedding"))
    adapters = 2 * 2 * (FULL.width + 32)
    gates, head = 2 * FULL.width * 4, 32 * FULL.width
    expected = flops.training - flops.linear + 2 * (gates + head) + 6 * adapters
    assert training_flops(FULL, lora, CONTEXT) == expected
    assert training_flops(FULL, None, CONTEXT) == flops.training
    with_phi = training_flops(MODEL, LoraConfig(modules_to_save=("compression",)), CONTEXT)
    without = training_flops(MODEL, LoraConfig(), CONTEXT)
    assert with_phi - without == flops_per_token(MODEL, CONTEXT).compression


@pytest.mark.parametrize(
    ("config", "lora", "problem"),
    [
        (MODEL, {"rank": 24}, "rank=24 must be less than model.width=24"),
        (MODEL, {"target_modules": ["down", "down"]}, "target_modules=.* must name each once"),
        (FULL, {"modules_to_save": ["compression"]}, "compression has no weights"),
        (
            FULL.model_copy(
                update={"attention": FULL.attention.model_copy(update={"gated": False})}
            ),
            {"modules_to_save": ["gate"]},
            "attention has no gate",
        ),
        (
            MOE.model_copy(
                update={"moe": MoeConfig(**{**ROUTED, "shared_experts": 0, "dense_layers": 0})}
            ),
            {"target_modules": ["query", "down"]},
            "of which the model has none",
        ),
    ],
)
def test_what_the_model_does_not_have(
    config: ModelConfig, lora: dict[str, Any], problem: str
) -> None:
    (found,) = LoraConfig.parse(lora).model_problems(config)
    assert re.search(problem, found)
    assert LoraConfig().model_problems(config.model_copy(update={"moe": None})) == []


def test_a_new_model_has_nothing_to_adapt() -> None:
    tree = {
        "name": "x",
        "model": MODEL.model_dump(),
        "data": {"path": "unused", "context_length": CONTEXT},
        "train": {"steps": 1, "tokens_per_step": CONTEXT, "lora": {}},
    }
    with pytest.raises(ConfigError, match=r"train\.lora adapts a model that exists"):
        PretrainRun.parse(tree)
    assert PretrainRun.parse({**tree, "model": None, "checkpoint": "m"}).train.lora == LoraConfig()
    with pytest.raises(ConfigError, match=r"train\.lora\.alpha.*greater than 0"):
        PretrainRun.parse({**tree, "train": {**tree["train"], "lora": {"alpha": 0}}})
