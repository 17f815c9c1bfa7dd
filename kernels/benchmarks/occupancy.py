"""How full the whole op's kernels keep the multiprocessors, and how much of their time is products.

    python kernels/benchmarks/occupancy.py [--only 64k ...] [--json results/occupancy.json]

Occupancy: warps that a launch has on a multiprocessor, by its registers, shared memory and grid as
the profiler tells them, over those that it can hold; a mean over kernels is weighted with their
time. (The profiler's own estimate is 0 for kernels with more than 48 KiB of shared memory.)
Products: the time that the op's least matrix products take at the rate of one large bf16 product
in the same run, over the time of the op's kernels. Blocks are chosen as in a trained model.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import nsa_kernels
from benchmarks.bench import ROOT, save, stamp
from benchmarks.counting import least_flops
from benchmarks.gate import op_output, op_tensors
from benchmarks.measure import ceilings
from benchmarks.workloads import WORKLOADS, Workload, make_tensors

DEFAULT = ("8k", "64k")
WARP = 32
"""Threads."""
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Multiprocessors:
    """What a GPU has of them, and what one holds."""

    count: int
    warps: int
    registers: int
    shared_bytes: int

    @classmethod
    def of_device(cls) -> Self:
        found = torch.cuda.get_device_properties()
        return cls(
            count=found.multi_processor_count,
            warps=found.max_threads_per_multi_processor // WARP,
            registers=found.regs_per_multiprocessor,
            shared_bytes=found.shared_memory_per_multiprocessor,
        )


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel of a profile."""

    name: str
    us: float
    blocks: int
    """Of threads, in the grid."""
    threads: int
    """Of a block."""
    registers: int
    """Of a thread."""
    shared_bytes: int
    """Of a block."""

    def occupancy(self, gpu: Multiprocessors) -> float:
        """Share of the warps that a multiprocessor can hold.

        Registers are given to warps by 256, to four warps at a time; shared memory to blocks by
        128 bytes, and 1 KiB more; 32 blocks at most. Source: CUDA C++ Programming Guide, compute
        capability 9.0.
        """
        warps = -(-self.threads // WARP)
        of_warp = -(-self.registers * WARP // 256) * 256
        of_block = -(-(self.shared_bytes + 1024) // 128) * 128
        fitting = min(
            gpu.registers // of_warp // 4 * 4 // warps,
            gpu.shared_bytes // of_block,
            gpu.warps // warps,
            32,
        )
        return min(fitting, self.blocks / gpu.count) * warps / gpu.warps


def launches_of(call: Callable[[], object]) -> list[Launch]:
    """The kernels of one call, which has run before."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(json.loads(path.read_text(encoding="utf-8")))


def read_trace(trace: Record) -> list[Launch]:
    """The kernels of a trace as torch's profiler exports it."""
    return [
        Launch(
            name=event["name"],
            us=float(event["dur"]),
            blocks=math.prod(event["args"]["grid"]),
            threads=math.prod(event["args"]["block"]),
            registers=int(event["args"]["registers per thread"]),
            shared_bytes=int(event["args"]["shared memory"]),
        )
        for event in trace["traceEvents"]
        if event.get("cat") == "kernel"
    ]


def records_of(
    name: str, launches: Sequence[Launch], gpu: Multiprocessors, *, flops: float, rate: float
) -> list[Record]:
    """What the launches of one call come to.

    Args:
        flops: of the least products of the call.
        rate: FLOP/s of one large product.
    """
    by_kernel: dict[str, list[Launch]] = {}
    for launch in launches:
        by_kernel.setdefault(launch.name, []).append(launch)
    total = sum(launch.us for launch in launches)
    kernels = [
        {
            "name": f"{name}/kernel/{kernel}",
            "value": _mean_occupancy(same, gpu),
            "unit": "share",
            "us": sum(launch.us for launch in same),
            "launches": len(same),
            "registers": max(launch.registers for launch in same),
            "shared_bytes": max(launch.shared_bytes for launch in same),
        }
        for kernel, same in by_kernel.items()
    ]
    return [
        {"name": f"{name}/occupancy", "value": _mean_occupancy(launches, gpu), "unit": "share"},
        {"name": f"{name}/products", "value": flops / rate / total * 1e6, "unit": "share"},
        {"name": f"{name}/time", "value": total / 1e3, "unit": "ms"},
        *sorted(kernels, key=lambda record: -record["us"]),
    ]


def _mean_occupancy(launches: Sequence[Launch], gpu: Multiprocessors) -> float:
    return sum(x.occupancy(gpu) * x.us for x in launches) / sum(x.us for x in launches)


def measure(workload: Workload, device: str, rate: float) -> Iterator[Record]:
    """The whole op forward without autograd, then backward alone."""
    tensors = make_tensors(workload, device, choice="real")
    inputs = op_tensors("nsa", tensors)

    def attend() -> Tensor:
        return op_output(nsa_kernels, "nsa", inputs, tensors.blocks, workload.config)

    with torch.no_grad():
        launches = {"forward": launches_of(attend)}
    for tensor in inputs:
        tensor.requires_grad_(True)
    backward = partial(torch.autograd.grad, attend(), inputs, tensors.dout, retain_graph=True)
    launches["backward"] = launches_of(backward)
    gpu = Multiprocessors.of_device()
    for direction, found in launches.items():
        flops = least_flops(workload, "nsa", direction)
        yield from records_of(f"{workload.name}/{direction}", found, gpu, flops=flops, rate=rate)


def main() -> int:
    every = [workload.name for workload in WORKLOADS if "nsa" in workload.real_ops]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=every,
        default=DEFAULT,
        metavar="NAME",
        help=f"workloads, of {', '.join(every)}; default: {', '.join(DEFAULT)}",
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=ROOT / "runs" / "bench" / "occupancy.json",
        help="where the records go; default: runs/bench/occupancy.json",
    )
    parser.add_argument("--commit", help="what to call this version where git cannot tell")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("occupancy: needs a CUDA GPU; torch sees none", file=sys.stderr)
        return 2
    about = stamp("cuda", arguments.commit, "python kernels/benchmarks/occupancy.py")
    ceiling = next(record for record in ceilings("cuda") if record["name"] == "ceiling/matmul")
    records = [ceiling]
    for workload in (w for w in WORKLOADS if w.name in arguments.only):
        records += measure(workload, "cuda", ceiling["value"] * 1e12)
        torch.cuda.empty_cache()
    for record in records:
        print(f"{record['name'][:80]:80s} {record['value']:9.3f} {record['unit']}", flush=True)
    save([{**record, **about} for record in records], arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
