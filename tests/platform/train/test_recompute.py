"""What the backward pass computes again: the same gradients, and no kernel that should be kept."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing._internal.distributed.fake_pg import FakeStore

from nsa_kernels import torch_backend
from nsa_platform.config.model import ModelConfig
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.partition import Axis, Partition
from nsa_platform.model.transformer import Layer, Transformer, init_weights
from nsa_platform.train.recompute import recompute_activations
from tests.platform.train.tiny_run import CONTEXT, MODEL, MOE, VOCAB

BY_BRANCH = ("compressed_forward", "select_blocks", "selected_forward", "sliding_forward")
# float32 sums in another order, as a share of the largest gradient of a parameter.
ROUNDING = 1e-5


def model_and_layers(config: ModelConfig = MODEL) -> tuple[Transformer, list[Layer]]:
    model = Transformer(config)
    init_weights(model, seed=0)
    return model, [layer for layer in model.layers if isinstance(layer, Layer)]


def gradients(model: Transformer) -> list[Tensor]:
    ids = torch.arange(2 * CONTEXT) * 7 % VOCAB
    hidden = model(ids, PackedInputs.from_lengths([CONTEXT, 30, CONTEXT - 30])).hidden
    loss = model.logits(hidden).logsumexp(-1).sum()
    return list(torch.autograd.grad(loss, list(model.parameters())))


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= ROUNDING * other.abs().max()


def test_layers_take_the_modes_in_turn(monkeypatch) -> None:
    model, layers = model_and_layers(MODEL.model_copy(update={"layers": 3}))
    plain = gradients(model)
    recompute_activations(layers, ("full", "none"))
    kernel, calls = torch_backend.nsa_forward, []

    def counted(*args):
        calls.append(1)
        return kernel(*args)

    monkeypatch.setattr(torch_backend, "nsa_forward", counted)
    assert_close(gradients(model), plain)
    # Forward through all three, and again through the first and the third.
    assert len(calls) == 3 + 2


@pytest.mark.parametrize(
    ("mode", "runs"),
    [
        ("none", {"nsa_forward": 1}),
        ("selective", {"nsa_forward": 1}),
        ("branches", dict.fromkeys(BY_BRANCH, 1) | {"sliding_forward": 2}),
        ("full", {"nsa_forward": 2}),
    ],
)
def test_how_often_each_kernel_runs(mode, runs, monkeypatch) -> None:
    plain = gradients(model_and_layers()[0])
    model, layers = model_and_layers()
    recompute_activations(layers, (mode,))
    counts: Counter[str] = Counter()

    def counted(name: str):
        kernel = getattr(torch_backend, name)

        def run(*args):
            counts[name] += 1
            return kernel(*args)

        return run

    for name in ("nsa_forward", *BY_BRANCH):
        monkeypatch.setattr(torch_backend, name, counted(name))
    found = gradients(model)
    assert counts == {name: MODEL.layers * times for name, times in runs.items()}
    assert_close(found, plain)


@pytest.mark.filterwarnings("ignore")  # the compiler warns of what it meets inside itself
@pytest.mark.parametrize("mode", ["none", "selective", "branches"])
def test_a_layer_compiles_without_a_graph_break(mode) -> None:
    """fullgraph raises at the first break, forward; the backward pass is one graph with it."""
    plain = gradients(model_and_layers()[0])
    model, layers = model_and_layers()
    recompute_activations(layers, (mode,))
    torch._dynamo.reset()
    for layer in layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    assert_close(gradients(model), plain)


@pytest.mark.filterwarnings("ignore")  # the compiler warns of what it meets inside itself
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_compiled_layers_with_experts_learn_the_same(mode) -> None:
    """Experts break the graph; attention stays compiled around them."""
    plain = gradients(model_and_layers(MOE)[0])
    model, layers = model_and_layers(MOE)
    recompute_activations(layers, (mode,))
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=graphs)
    assert_close(gradients(model), plain)
    attentions = [
        node
        for graph in graphs.graphs
        for part in graph.modules()
        if isinstance(part, torch.fx.GraphModule)
        for node in part.graph.nodes
        if "nsa_attention" in str(node.target)
    ]
    assert len(attentions) >= MOE.layers


@pytest.fixture
def two_workers() -> Iterator[Axis]:
    """The first of two workers, whose messages go nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield Axis(0, 2, dist.group.WORLD.group_name)  # pyright: ignore[reportOptionalMemberAccess]
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # the compiler warns of what it meets inside itself
@pytest.mark.parametrize("name", ["context", "tensor"])
def test_shared_work_compiles_without_a_graph_break(name, two_workers: Axis) -> None:
    model, layers = model_and_layers()
    recompute_activations(layers, ("selective",))
    torch._dynamo.reset()
    for layer in layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    axis = two_workers
    inputs = replace(PackedInputs.from_lengths([CONTEXT]), partition=Partition(**{name: axis}))
    own = axis.own(CONTEXT) if name == "context" else slice(None)
    inputs = replace(inputs, positions=inputs.positions[own])
    hidden = model(torch.arange(CONTEXT)[own] % VOCAB, inputs).hidden
    hidden.sum().backward()
    assert hidden.shape == (len(inputs.positions), MODEL.width)
    assert all(p.grad is not None for p in model.parameters())
