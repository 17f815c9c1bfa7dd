"""Times one NSA layer of a model on a GPU, and what it spends around its attention op.

    PYTHONPATH=platform:kernels:. python3 kernels/benchmarks/layer.py [--tokens 8192] [--kernels 12]

The layer is nsa-1b's: width 2048, 32 query and 2 key/value heads of 128, bf16. Each part of it is
captured alone in a CUDA graph and replayed, forward and forward + backward, so that no launch from
Python is timed. Overhead is all that is neither the op (on contiguous inputs) nor a projection:
phi, rotary, gates, copies, sums of gradients. It is found by difference, so nothing can hide.
Needs the platform's packages beside torch and triton.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from nsa_kernels import nsa_attention
from nsa_platform.config.model import ModelConfig, NsaAttentionConfig
from nsa_platform.model import attention as attention_module
from nsa_platform.model.attention import NsaAttention
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.step import PackedStep, packed_step, paged_step
from nsa_platform.model.transformer import initial_tensor
from nsa_platform.serve.kv_cache import KvCache
from nsa_platform.serve.pages import SequencePages

ROOT = Path(__file__).parents[2]
MODEL = {
    "name": "nsa-1b",
    "vocab_size": 32768,
    "layers": 24,
    "width": 2048,
    "ffn_width": 5632,
    "max_context": 1 << 20,
    "attention": {"kind": "nsa", "query_heads": 32, "kv_heads": 2},
}
# Two bf16 computations of the same layer differ by rounding, and by blocks that rounding chooses.
MAX_ERROR = 0.03
PROJECTIONS = ("query", "key_value", "gate", "output")
AROUND = ("phi", "rotary q", "rotary k", "gates")
DECODE = ((1, 8192), (32, 8192))
_REPEATS = 3

Run = Callable[..., Tensor | tuple[Tensor, ...]]
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the layer: what it computes from which tensors."""

    run: Run
    inputs: Sequence[Tensor]
    weights: Sequence[Tensor]

    def outputs(self) -> list[Tensor]:
        result = self.run(*self.inputs)
        return [result] if isinstance(result, Tensor) else list(result)

    def compiled(self) -> "Part":
        return Part(torch.compile(self.run), self.inputs, self.weights)

    def both_ways(self) -> Call:
        """Forward and backward, for random gradients of the outputs."""
        wanted = [*self.inputs, *self.weights]
        gradients = [torch.randn_like(output) for output in self.outputs()]
        return lambda: torch.autograd.grad(self.outputs(), wanted, gradients)


@dataclass(frozen=True, slots=True)
class Case:
    """A layer with weights as training starts from, and one packed sequence for it."""

    layer: NsaAttention
    step: PackedStep
    x: Tensor


def make_config() -> ModelConfig:
    return ModelConfig.parse(MODEL)


def make_layer(config: ModelConfig, device: str, dtype: torch.dtype) -> NsaAttention:
    """A layer of the model; a little noise keeps what starts at zero from staying there."""
    assert isinstance(config.attention, NsaAttentionConfig)
    layer = NsaAttention(config, config.attention, layer_index=0)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            name = f"layers.0.attention.{name}"
            parameter.copy_(initial_tensor(config, name, parameter.shape, seed=0))
            parameter += 0.02 * torch.randn_like(parameter)
    return layer.to(device, dtype)


def make_case(
    config: ModelConfig, tokens: int, device: str, dtype: torch.dtype = torch.bfloat16
) -> Case:
    """Normal input, as an RMSNorm leaves it; one sequence."""
    torch.manual_seed(0)
    layer = make_layer(config, device, dtype)
    inputs = PackedInputs.from_lengths([tokens], device=device)
    x = torch.randn(tokens, config.width, device=device, dtype=dtype)
    return Case(layer, packed_step(inputs, config, dtype=dtype), x)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(True)


def parts_of(case: Case) -> dict[str, Part]:
    """The whole layer, the op on what the layer hands it, the projections, and what is around.

    Inputs have the strides that they have in the layer.
    """
    layer, step, config = case.layer, case.step, case.layer.config
    x = _leaf(case.x)
    with mock.patch.object(attention_module, "nsa_attention", wraps=nsa_attention) as op:
        hidden = layer(x, step)
    received = [_leaf(t.contiguous()) for t in op.call_args.args]
    attend = partial(nsa_attention, **op.call_args.kwargs)

    groups, width = config.kv_heads, config.key_width
    q = layer.query(x).unflatten(1, (config.query_heads, width))
    pair = groups * width, groups * config.value_width
    sizes = [pair[0], 2 * pair[0], pair[1], 2 * pair[1]]
    raw, keys, value, _ = layer.key_value(x).split(sizes, dim=1)
    raw, value = (t.unflatten(1, (groups, -1)) for t in (raw, value))
    keys = keys.unflatten(1, (2, groups, width)).transpose(0, 1)
    assert layer.gate is not None
    gate = layer.gate(x)
    phi = [*layer.compress_key.parameters(), *layer.compress_value.parameters()]
    rotate = step.rotation.apply
    parts = {
        "layer": Part(lambda x: layer(x, step), [x], list(layer.parameters())),
        "op": Part(attend, received, []),
        "phi": Part(partial(fold, layer, step), [_leaf(raw), _leaf(value)], phi),
        "rotary q": Part(rotate, [_leaf(q)], []),
        "rotary k": Part(rotate, [_leaf(keys)], []),
        "gates": Part(torch.sigmoid, [_leaf(gate)], []),
    }
    read = {name: x for name in PROJECTIONS} | {"output": received[0].flatten(1)}
    for name in PROJECTIONS:
        linear = getattr(layer, name)
        assert isinstance(linear, nn.Linear)
        parts[name] = Part(linear, [_leaf(read[name])], list(linear.parameters()))
    assert hidden.shape == x.shape
    return parts


def fold(layer: NsaAttention, step: PackedStep, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """phi of the raw keys and values, the keys rotated to their blocks' starts."""
    assert step.blocks is not None and step.block_rotation is not None
    k_cmp = layer.compress_key.fold_packed(k, step.blocks).to(k.dtype)
    v_cmp = layer.compress_value.fold_packed(v, step.blocks).to(v.dtype)
    return step.block_rotation.apply(k_cmp), v_cmp


def check(device: str, tokens: int = 1100) -> None:
    """phi and rotary in bf16 against fp64, the compiled layer against the other.

    Raises:
        ValueError: an output or a gradient is off by more than MAX_ERROR (relative L2).
    """
    config = make_config()
    case = make_case(config, tokens, device)
    exact_step = packed_step(
        PackedInputs.from_lengths([tokens], device=device), config, dtype=torch.float64
    )
    parts = parts_of(case)
    double = make_layer(config, device, torch.float64)
    double.load_state_dict(case.layer.state_dict())
    weights = [*double.compress_key.parameters(), *double.compress_value.parameters()]
    references = {
        "phi": Part(
            partial(fold, double, exact_step),
            [_leaf(t.double()) for t in parts["phi"].inputs],
            weights,
        ),
        "rotary q": Part(
            exact_step.rotation.apply, [_leaf(t.double()) for t in parts["rotary q"].inputs], []
        ),
        "layer": parts["layer"],
    }
    for name, reference in references.items():
        for kind, part in (("eager", parts[name]), ("compiled", parts[name].compiled())):
            error = _error(part, reference)
            print(f"check {name:9s} {kind:9s} {error:.4f}", flush=True)
            if not error <= MAX_ERROR:
                raise ValueError(f"{name}, {kind}: relative error {error} > {MAX_ERROR}")


def _error(part: Part, reference: Part) -> float:
    """The largest relative error of the outputs and the gradients."""
    found, wanted = part.outputs(), reference.outputs()
    gradients = [torch.randn_like(output) for output in found]
    found += torch.autograd.grad(found, [*part.inputs, *part.weights], gradients)
    wanted += torch.autograd.grad(
        wanted,
        [*reference.inputs, *reference.weights],
        [g.to(w.dtype) for g, w in zip(gradients, wanted, strict=True)],
    )
    return max(
        float((a - b).norm() / b.norm())
        for a, b in zip(
            *([t.detach().double() for t in side] for side in (found, wanted)), strict=True
        )
    )


def graph_ms(call: Call, rep_ms: int) -> float:
    """Median milliseconds of a call replayed from a CUDA graph, L2 flushed between replays.

    Captured on the current stream, no default one: gradients would meet leaves of another stream.
    """
    for _ in range(_REPEATS):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    return launched_ms(graph.replay, rep_ms)


def launched_ms(call: Call, rep_ms: int) -> float:
    """Median milliseconds of a call launched from Python, L2 flushed between calls."""
    median: Any = triton.testing.do_bench(call, warmup=10, rep=rep_ms, return_mode="median")
    return float(median)


def op_kernels() -> set[str]:
    """Names of the attention op's kernels."""
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("nsa_kernels.")]
    return {
        item.fn.__name__
        for module in modules
        for item in vars(module).values()
        if isinstance(item, triton.JITFunction)
    }


def kernel_times(call: Call) -> dict[str, tuple[float, float]]:
    """Microseconds and launches of each kernel in one call."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(_REPEATS):
            call()
        torch.cuda.synchronize()
    times: dict[str, tuple[float, float]] = {}
    for event in profiler.key_averages():
        if event.device_time_total > 0:
            times[event.key] = (event.device_time_total / _REPEATS, event.count / _REPEATS)
    return times


def print_kernels(title: str, times: dict[str, tuple[float, float]], most: int) -> None:
    """The kernels' time in three kinds, and the longest that belong to neither op nor products."""
    own = op_kernels()
    kinds: dict[str, dict[str, tuple[float, float]]] = {"op": {}, "products": {}, "around": {}}
    for name, time in times.items():
        kinds[_kind(name, own)][name] = time
    for kind, found in kinds.items():
        us, launches = (sum(t[i] for t in found.values()) for i in (0, 1))
        print(f"{title}: {kind:9s} {us / 1e3:7.3f} ms in {launches:.0f} kernels", flush=True)
    for name, (us, count) in sorted(kinds["around"].items(), key=lambda item: -item[1][0])[:most]:
        print(f"  {us:7.1f} us {count:4.0f} x {name[:100]}", flush=True)


def _kind(name: str, own: set[str]) -> str:
    if name in own:
        return "op"
    words = ("gemm", "nvjet", "cutlass", "cublas", "splitk", "xmma", "gemv")
    return "products" if any(word in name.lower() for word in words) else "around"


def measure(tokens: int, device: str, *, rep_ms: int, kernels: int) -> Iterator[tuple[str, float]]:
    """Times in milliseconds by name: part/eager or compiled/forward or both."""
    parts = parts_of(make_case(make_config(), tokens, device))
    for name, part in parts.items():
        modes = {"eager": part}
        if name in ("layer", *AROUND):
            modes["compiled"] = part.compiled()
        for mode, chosen in modes.items():
            yield f"{name}/{mode}/forward", graph_ms(chosen.outputs, rep_ms)
            both = chosen.both_ways()
            yield f"{name}/{mode}/both", graph_ms(both, rep_ms)
            if name == "layer":
                yield f"{name}/{mode}/launched", launched_ms(both, rep_ms)
                if kernels:
                    print_kernels(mode, kernel_times(both), kernels)


def table(times: dict[str, float]) -> list[str]:
    """Each part's time, and its share of the layer's forward and backward."""
    lines = [
        "| ms | eager, forward | both | share | compiled, forward | both | share |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows: dict[str, dict[str, float]] = {}
    for mode in ("eager", "compiled"):
        for way in ("forward", "both"):
            column = f"{mode}/{way}"

            def of(name: str, column: str = column, way: str = way) -> float:
                return times.get(f"{name}/{column}", times[f"{name}/eager/{way}"])

            products = sum(of(name) for name in PROJECTIONS)
            overhead = of("layer") - of("op") - products
            known = {name: of(name) for name in AROUND}
            for name, value in {
                "layer": of("layer"),
                "op": of("op"),
                "projections": products,
                "overhead": overhead,
                **known,
                "the rest": overhead - sum(known.values()),
            }.items():
                rows.setdefault(name, {})[column] = value
    for name, row in rows.items():
        cells = []
        for mode in ("eager", "compiled"):
            share = row[f"{mode}/both"] / rows["layer"][f"{mode}/both"]
            cells += [f"{row[f'{mode}/forward']:.3f}", f"{row[f'{mode}/both']:.3f}", f"{share:.1%}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


@torch.no_grad()
def measure_decode(batch: int, context: int, device: str) -> str:
    """One new token for each sequence through the layer's pages, as a line of text; the positions
    differ, as those of independent requests do, so that a few of them complete a block."""
    config = make_config().model_copy(update={"layers": 1})
    layer = make_layer(config, device, torch.bfloat16)
    cache = KvCache(
        config,
        num_tokens=batch * (context + 64),
        max_new_tokens=context,
        max_sequences=batch,
        device=device,
        dtype=torch.bfloat16,
    )
    for tensor in cache.layers[0].page_tensors() + cache.layers[0].window_tensors():
        tensor.normal_()
    sequences = [SequencePages() for _ in range(batch)]
    cache.extend(sequences, [context - index % 16 - 1 for index in range(batch)])
    inputs = cache.extend(sequences, [1] * batch)
    x = torch.randn(batch, config.width, device=device, dtype=torch.bfloat16)
    step = paged_step(inputs, config, dtype=x.dtype)
    times = kernel_times(lambda: layer(x, step, cache.layers[0]))
    own = op_kernels()
    ours = [time for name, time in times.items() if _kind(name, own) == "op"]
    replayed = graph_ms(lambda: layer(x, step, cache.layers[0]), 20)
    launched = launched_ms(lambda: layer(x, step, cache.layers[0]), 20)
    return (
        f"decode, batch {batch} at {context}: {sum(t[1] for t in times.values()):.0f} kernels "
        f"({sum(t[1] for t in ours):.0f} of the op), busy {sum(t[0] for t in times.values()):.0f} "
        f"us ({sum(t[0] for t in ours):.0f} of the op), replayed {1e3 * replayed:.0f} us, "
        f"launched {1e3 * launched:.0f} us"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--kernels", type=int, default=0, help="list this many kernels around")
    parser.add_argument("--rep-ms", type=int, default=60)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("layer: needs a CUDA or ROCm GPU; torch sees none", file=sys.stderr)
        return 2
    with torch.cuda.stream(torch.cuda.Stream()):
        run(arguments)
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Check, measure, print."""
    check("cuda")
    times = dict(
        measure(arguments.tokens, "cuda", rep_ms=arguments.rep_ms, kernels=arguments.kernels)
    )
    print(f"\n{torch.cuda.get_device_name()}, {arguments.tokens} tokens, bf16\n")
    print("\n".join(table(times)))
    for mode in ("eager", "compiled"):
        print(f"{mode}, launched from Python: {times[f'layer/{mode}/launched']:.3f} ms")
    for batch, context in DECODE:
        print(measure_decode(batch, context, "cuda"), flush=True)


if __name__ == "__main__":
    sys.exit(main())
