"""The whole model: gradients everywhere, packing, causality, initialisation, torch.compile."""

import math
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.probe import Probe
from nsa_platform.model.transformer import Transformer, init_weights, initial_tensor

VARIANTS = {
    "mlp": ({}, {}),
    "mean": ({"compression": "mean"}, {}),
    "linear": ({"compression": "linear"}, {}),
    "shared": ({"branch_kv": "shared"}, {}),
    "no-gates": ({"gates": "none"}, {}),
    "rotated-before": ({"compressed_rotary": "before"}, {}),
    "unrotated-blocks": ({"compressed_rotary": "none"}, {}),
    "full": ({"kind": "full"}, {}),
    "full-gated": ({"kind": "full", "gated": True}, {}),
    "biases-and-norms": ({"qkv_bias": True, "qk_norm": True}, {}),
    "untied": ({}, {"tie_embeddings": False}),
    "yarn": ({}, {"yarn": {"factor": 4, "original_context": 64}}),
    "moe": (
        {},
        {"moe": {"routed_experts": 4, "experts_per_token": 2, "expert_width": 16}},
    ),
}


@pytest.fixture(params=VARIANTS)
def variant(request, make_config):
    attention, fields = VARIANTS[request.param]
    return make_config(attention, **fields)


def ids_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(seed))


def test_every_parameter_gets_a_gradient(variant, make_model):
    model = make_model(variant)
    output = model(ids_of(70), PackedInputs.from_lengths([70]))
    logits = model.logits(output.hidden)
    assert output.hidden.shape == (70, 32) and logits.shape == (70, 61)
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids_of(70)[1:]) + output.balance_loss
    loss.backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None
        or not parameter.grad.isfinite().all()
        or not parameter.grad.abs().sum() > 0
    ]
    assert not without


def test_packing_two_documents_equals_running_them_apart(variant, make_model):
    model = make_model(variant, dtype=torch.float64)
    first, second, third = ids_of(37, 1), ids_of(5, 2), ids_of(53, 3)
    together = model(torch.cat([first, second, third]), PackedInputs.from_lengths([37, 5, 53]))
    apart = [model(ids, PackedInputs.from_lengths([len(ids)])) for ids in (first, second, third)]
    torch.testing.assert_close(together.hidden, torch.cat([output.hidden for output in apart]))


def test_packed_gradients_equal_the_sum_of_those_apart(make_config, make_model):
    model = make_model(make_config(), dtype=torch.float64)
    documents = [ids_of(30, 1), ids_of(7, 2), ids_of(41, 3)]

    def loss(ids, lengths):
        hidden = model(ids, PackedInputs.from_lengths(lengths)).hidden
        return (model.logits(hidden).logsumexp(-1)).sum()

    parameters = list(model.parameters())
    together = torch.autograd.grad(loss(torch.cat(documents), [30, 7, 41]), parameters)
    losses = torch.stack([loss(ids, [len(ids)]) for ids in documents])
    apart = torch.autograd.grad(losses.sum(), parameters)
    for (name, _), a, b in zip(model.named_parameters(), together, apart, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("changed", [1, 7, 8, 9, 40, 46])
def test_no_token_sees_the_future(variant, make_model, changed):
    model = make_model(variant)
    ids = ids_of(47)
    other = ids.clone()
    other[changed:] = (other[changed:] + 1) % 61
    inputs = PackedInputs.from_lengths([47])
    with torch.no_grad():
        before, after = model(ids, inputs).hidden, model(other, inputs).hidden
    if variant.moe is None:
        assert torch.equal(before[:changed], after[:changed])
    else:  # an expert's matrix product may round differently with other tokens beside
        torch.testing.assert_close(before[:changed], after[:changed])
    assert (before[changed:] - after[changed:]).abs().sum(-1).min() > 0


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8])
def test_sequences_shorter_than_a_block(make_config, make_model, length):
    model = make_model(make_config())
    hidden = model(ids_of(length), PackedInputs.from_lengths([length])).hidden
    hidden.sum().backward()
    assert hidden.isfinite().all()
    grads = {name: p.grad for name, p in model.named_parameters()}
    fold = grads["layers.0.attention.compress_value.fold"]
    seen = fold is not None and bool(fold.abs().sum() > 0)
    assert seen == (length >= 8)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_layer_compiles_without_a_graph_break(make_config, make_model):
    model = make_model(make_config())
    ids, inputs = ids_of(64), PackedInputs.from_lengths([40, 24])
    plain = model(ids, inputs).hidden
    torch._dynamo.reset()
    for layer in model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    compiled = model(ids, inputs).hidden
    compiled.sum().backward()
    torch.testing.assert_close(compiled, plain)
    assert all(parameter.grad is not None for parameter in model.parameters())
    probe = Probe()
    model(ids, replace(inputs, probe=probe))
    assert list(probe.summary()) == [0, 1]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_layer_with_experts_is_compiled_once(make_config, make_model):
    moe = {"routed_experts": 4, "experts_per_token": 2, "expert_width": 16, "dense_layers": 0}
    model = make_model(make_config(moe=moe, layers=1))
    inputs = PackedInputs.from_lengths([40, 24])
    wanted = [model(ids_of(64, seed), inputs).hidden for seed in range(4)]
    torch._dynamo.reset()
    frames = CompileCounter()
    model.layers[0].compile(backend=frames)
    counts = []
    for seed, plain in enumerate(wanted):
        torch.testing.assert_close(model(ids_of(64, seed), inputs).hidden, plain)
        counts.append(frames.frame_count)
    assert counts == [counts[0]] * 4 and counts[0] > 0


def test_a_layer_can_be_recomputed(make_config, make_model):
    model = make_model(make_config())
    ids, inputs = ids_of(40), PackedInputs.from_lengths([25, 15])
    parameters = list(model.parameters())
    plain = torch.autograd.grad(model(ids, inputs).hidden.square().sum(), parameters)
    for layer in model.layers:
        kept = layer.forward
        layer.forward = lambda *args, kept=kept: checkpoint(kept, *args, use_reentrant=False)
    again = torch.autograd.grad(model(ids, inputs).hidden.square().sum(), parameters)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16-weights", "autocast"])
def test_bfloat16_stays_near_float32(make_config, make_model, autocast):
    moe = {"routed_experts": 4, "experts_per_token": 4, "expert_width": 16}
    model = make_model(make_config(moe=moe))
    ids, inputs = ids_of(50), PackedInputs.from_lengths([50])
    wanted = model(ids, inputs).hidden.detach()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = (model if autocast else model.bfloat16())(ids, inputs)
    output.hidden.sum().backward()
    error = (output.hidden.float() - wanted).norm() / wanted.norm()
    assert error < 0.05


def test_initial_weights_depend_on_the_seed_and_the_name_alone(make_config):
    config = make_config()
    model, same, other = Transformer(config), Transformer(config), Transformer(config)
    init_weights(model, 7)
    init_weights(same, 7)
    init_weights(other, 8)
    for (name, one), two in zip(model.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, initial_tensor(config, name, one.shape, seed=7))
    query, down = "layers.0.attention.query.weight", "layers.{}.ffn.down.weight"
    assert not torch.equal(model.get_parameter(query), other.get_parameter(query))
    first, second = (model.get_parameter(down.format(layer)) for layer in (0, 1))
    assert not torch.equal(first, second)


def test_initial_weights_follow_the_table(make_config):
    moe = {"routed_experts": 4, "expert_width": 64, "experts_per_token": 2}
    config = make_config({"gate_bias": [-2.0, -1.0, 2.0]}, moe=moe, width=64)
    model = Transformer(config)
    init_weights(model, 0)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    residual = 1 / math.sqrt(2 * config.layers)
    deviations = {
        "layers.0.attention.query.weight": 64**-0.5,
        "layers.0.attention.output.weight": 32**-0.5 * residual,
        "layers.0.ffn.down.weight": 48**-0.5 * residual,
        "layers.0.attention.compress_key.fold": (8 * 16) ** -0.5,
        "layers.1.ffn.experts.gate_up": 64**-0.5,
        "layers.1.ffn.experts.down": 64**-0.5 * residual,
        "layers.1.ffn.shared.down.weight": 128**-0.5 * residual,
        "embedding.weight": 64**-0.5,
    }
    for name, deviation in deviations.items():
        assert float(weights[name].std()) == pytest.approx(deviation, rel=0.1), name
    bias = weights["layers.1.attention.gate.bias"].unflatten(0, (4, 3))
    assert bias.tolist() == [[-2.0, -1.0, 2.0]] * 4
    assert not weights["layers.0.attention.gate.weight"].any()
    assert not weights["layers.0.attention.compress_key.correct"].any()
    assert torch.equal(weights["layers.0.ffn_norm.weight"], torch.ones(64))


@pytest.mark.parametrize("compression", ["linear", "mlp"])
def test_phi_starts_as_the_mean(make_config, compression):
    hidden = []
    for kind in (compression, "mean"):
        model = Transformer(make_config({"compression": kind}))
        init_weights(model, 0)
        hidden.append(model(ids_of(60), PackedInputs.from_lengths([60])).hidden)
    torch.testing.assert_close(*hidden)


def test_model_holds_no_buffers_and_can_be_built_on_the_meta_device(make_config):
    with torch.device("meta"):
        model = Transformer(make_config())
    assert not list(model.buffers())
    model.to_empty(device="cpu")
    init_weights(model, 0)
    assert model(ids_of(9), PackedInputs.from_lengths([9])).hidden.isfinite().all()


def test_impossible_lengths_are_refused():
    with pytest.raises(ValueError, match="positive"):
        PackedInputs.from_lengths([3, 0])
    with pytest.raises(ValueError, match="positive"):
        PackedInputs.from_lengths([])
