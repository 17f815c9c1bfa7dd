"""Times every op, forward and backward, beside torch's own attention, on one GPU.

    python kernels/benchmarks/bench.py [--quick] [--json results/kernels.json]

First a gate: every op's output and gradients against the float64 reference; if one is off, nothing
is timed. Then medians, L2 flushed between calls. Prints as it goes, writes the records as JSON and
renders RESULTS.md from them.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import nsa_kernels
from benchmarks import report
from benchmarks.decode import measure_decode
from benchmarks.timing import median_ms
from benchmarks.workloads import (
    GATE,
    QUICK,
    WORKLOADS,
    Tensors,
    Workload,
    attended_pairs,
    attention_flops,
    make_tensors,
)
from nsa_kernels import reference

ROOT = Path(__file__).parents[2]
OPS = {
    "compressed": "compressed_attention",
    "selected": "selected_attention",
    "sliding": "sliding_attention",
    "full": "full_attention",
    "nsa": "nsa_attention",
}
SDPA = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}
# bf16 kernels that accumulate in fp32 reach 0.2 to 0.5 %; a wrong one is off by far more.
MAX_ERROR = 0.01

Attention = Callable[[], Tensor]


class RedGate(Exception):
    """An op disagrees with the reference. Speed means nothing then."""


def op_tensors(op: str, tensors: Tensors) -> list[Tensor]:
    """The differentiable inputs of an op, in its order."""
    if op == "compressed":
        return [tensors.q, tensors.k_cmp, tensors.v_cmp]
    if op == "selected":
        return [tensors.q, tensors.k_slc, tensors.v_slc]
    if op in ("sliding", "full"):
        return [tensors.q, tensors.k_win, tensors.v_win]
    return [
        tensors.q, tensors.k_cmp, tensors.v_cmp, tensors.k_slc, tensors.v_slc,
        tensors.k_win, tensors.v_win, tensors.gates,
    ]  # fmt: skip


def op_output(module: Any, op: str, inputs: list[Tensor], blocks: Tensor, config: Any) -> Tensor:
    """out of nsa_kernels' op, or of its twin in the reference."""
    choice = [blocks] if op == "selected" else []
    options = {} if op == "full" else {"config": config}
    result = getattr(module, OPS[op])(*inputs, *choice, **options)
    return result if isinstance(result, Tensor) else result[0]


def check_gate(workload: Workload, device: str) -> None:
    """Compare every op with the reference at the workload's widths.

    Raises:
        RedGate: an output or a gradient is off by more than MAX_ERROR (relative L2).
    """
    small = replace(GATE, key_width=workload.key_width, value_width=workload.value_width)
    tensors = make_tensors(small, device)
    for op in OPS:
        inputs = [t.detach().requires_grad_(True) for t in op_tensors(op, tensors)]
        exact_inputs = [t.detach().double().requires_grad_(True) for t in inputs]
        out = op_output(nsa_kernels, op, inputs, tensors.blocks, small.config)
        exact = op_output(reference, op, exact_inputs, tensors.blocks, small.config)
        gradients = torch.autograd.grad(out, inputs, tensors.dout)
        exact_gradients = torch.autograd.grad(exact, exact_inputs, tensors.dout.double())
        pairs = zip((out, *gradients), (exact, *exact_gradients), strict=True)
        errors = [
            float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in pairs
        ]
        print(f"gate {small.key_width}/{small.value_width} {op:10s} {max(errors):.4f}", flush=True)
        if not max(errors) <= MAX_ERROR:
            raise RedGate(f"{op}: relative errors of out and gradients {errors} > {MAX_ERROR}")


def measure_ceilings(device: str) -> Iterator[dict[str, Any]]:
    """bf16 matrix products and memory copies: what the kernels could reach at most."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    ms = median_ms(lambda: a @ a)
    yield {"name": "ceiling/matmul", "value": 2 * 8192**3 / ms / 1e9, "unit": "TFLOP/s"}
    big = torch.empty(2**30, dtype=torch.uint8, device=device)
    ms = median_ms(big.clone)
    yield {"name": "ceiling/copy", "value": 2 * big.numel() / ms / 1e9, "unit": "TB/s"}


def time_attention(
    name: str, attend: Attention, inputs: list[Tensor], dout: Tensor, rep_ms: int
) -> Iterator[dict[str, Any]]:
    """Forward without autograd, then backward alone."""
    with torch.no_grad():
        forward_ms = median_ms(attend, rep_ms)
    yield {"name": f"{name}/forward", "value": forward_ms, "unit": "ms"}
    for tensor in inputs:
        tensor.requires_grad_(True)
    out = attend()
    backward_ms = median_ms(
        lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True), rep_ms
    )
    yield {"name": f"{name}/backward", "value": backward_ms, "unit": "ms"}
    for tensor in inputs:
        tensor.requires_grad_(False)


def measure_ops(workload: Workload, device: str, rep_ms: int) -> Iterator[dict[str, Any]]:
    """Every op of nsa_kernels, and the choice of blocks alone."""
    tensors = make_tensors(workload, device)
    config = workload.config
    for op in OPS:
        inputs = op_tensors(op, tensors)
        pairs = attended_pairs(workload, op, tensors.blocks)

        def attend(op: str = op, inputs: list[Tensor] = inputs) -> Tensor:
            return op_output(nsa_kernels, op, inputs, tensors.blocks, config)

        for record in time_attention(f"{workload.name}/{op}", attend, inputs, tensors.dout, rep_ms):
            direction = record["name"].rsplit("/", 1)[1]
            yield {**record, "flops": attention_flops(workload, direction, pairs)}
    _, lse = nsa_kernels.compressed_attention(*op_tensors("compressed", tensors), config=config)
    ms = median_ms(
        lambda: nsa_kernels.select_blocks(tensors.q, tensors.k_cmp, lse, config=config), rep_ms
    )
    yield {"name": f"{workload.name}/select_blocks/forward", "value": ms, "unit": "ms"}


def measure_sdpa(workload: Workload, device: str, rep_ms: int) -> Iterator[dict[str, Any]]:
    """torch's attention with each of its fast kernels; one that refuses the shape is left out."""
    tensors = make_tensors(workload, device)
    # [1, H, T, K], the layout that torch's kernels want; grouped keys stay grouped.
    q, k, v = inputs = [t.transpose(0, 1)[None] for t in op_tensors("full", tensors)]
    dout = tensors.dout.transpose(0, 1)[None]
    pairs = attended_pairs(workload, "full", tensors.blocks)
    for name, kernel in SDPA.items():

        def attend(kernel: SDPBackend = kernel) -> Tensor:
            with sdpa_kernel(kernel):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                )

        try:
            for record in time_attention(f"{workload.name}/{name}", attend, inputs, dout, rep_ms):
                direction = record["name"].rsplit("/", 1)[1]
                yield {**record, "flops": attention_flops(workload, direction, pairs)}
        except RuntimeError as error:
            first_line = str(error).splitlines()[0]
            print(f"{workload.name}/{name}: left out, torch refuses: {first_line}", flush=True)


def stamp(device: str, commit: str | None, command: str) -> dict[str, Any]:
    """What every record says about where it comes from."""
    if commit is None:
        git = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
        done = subprocess.run(git, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() if done.returncode == 0 else "unknown"
    return {
        "device": torch.cuda.get_device_name(device),
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": str(torch.version.cuda),
            "python": platform.python_version(),
        },
        "commit": commit,
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
    }


def measure(workloads: list[Workload], device: str, *, rep_ms: int) -> Iterator[dict[str, Any]]:
    """All records, after the gate of each width."""
    widths = {(w.key_width, w.value_width): w for w in workloads}
    for workload in widths.values():
        check_gate(workload, device)
    yield from measure_ceilings(device)
    for workload in workloads:
        for part in (measure_ops, measure_sdpa):
            for record in part(workload, device, rep_ms):
                shape = {
                    "tokens": workload.tokens,
                    "heads": workload.heads,
                    "groups": workload.groups,
                    "key_width": workload.key_width,
                    "value_width": workload.value_width,
                    "dtype": str(workload.dtype).removeprefix("torch."),
                }
                yield {**record, "direction": record["name"].rsplit("/", 1)[1], **shape}
            torch.cuda.empty_cache()


def save(records: list[dict[str, Any]], path: Path) -> None:
    """Write the records as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    temporary.rename(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}; no decode")
    parser.add_argument("--json", type=Path, default=ROOT / "results" / "kernels.json")
    parser.add_argument("--commit", help="what to call this version where git cannot tell")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench: needs a CUDA or ROCm GPU; torch sees none", file=sys.stderr)
        return 2
    device = "cuda"
    command = "python kernels/benchmarks/bench.py" + (" --quick" if arguments.quick else "")
    about = stamp(device, arguments.commit, command)
    workloads = [w for w in WORKLOADS if not arguments.quick or w.name in QUICK]
    records = []
    try:
        for record in measure(workloads, device, rep_ms=50 if arguments.quick else 200):
            print(f"{record['name']:32s} {record['value']:10.3f} {record['unit']}", flush=True)
            records.append({**record, **about})
        if not arguments.quick:
            for record in measure_decode():
                print(f"{record['name']:44s} {record['value']:10.1f} {record['unit']}", flush=True)
                records.append({**record, **about})
    finally:
        # What was measured before something broke is still true.
        save(records, arguments.json)
    if not arguments.quick:
        report.write(records)
    print(report.render(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
