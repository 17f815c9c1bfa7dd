"""Times every op, forward and backward, beside the attention of others, on one GPU.

    python kernels/benchmarks/bench.py [--quick] [--only NAME ...] [--json results/kernels.json]

First a gate: every op's output and gradients against the float64 reference; if one is off, nothing
is timed. Then medians, L2 flushed between calls, with blocks chosen at random and as a trained
model's neighbours share them. Prints as it goes, writes the records as JSON, and renders
RESULTS.md and the pictures in docs/ from them. The whole run takes 9 minutes on an H100, --quick 2.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import triton
from triton.errors import TritonError

from benchmarks import measure
from benchmarks.decode import measure_decode
from benchmarks.gate import RedGate, check_gate
from benchmarks.peers import Peer, installed_peers
from benchmarks.report import render, write_page
from benchmarks.workloads import LONG, QUICK, WORKLOADS

ROOT = Path(__file__).parents[2]
BATCHES = (1, 8, 32)
CONTEXTS = (8192, 16384, 32768, 65536, 131072, 262144)
QUICK_CONTEXTS = (8192, 65536)

Record = dict[str, Any]
Section = tuple[str, Callable[[], Iterable[Record]]]
"""What it measures, for the log; and its records, one by one."""


def sections(names: set[str], device: str, peers: list[Peer], *, quick: bool) -> Iterator[Section]:
    """The parts of a run. One that breaks leaves the others alone."""
    rep_ms = 50 if quick else 200
    yield "ceilings", lambda: measure.ceilings(device)
    for workload in (w for w in WORKLOADS if w.name in names):
        for choice in ("uniform", "real"):
            yield (
                f"{workload.name}, {choice}",
                lambda w=workload, c=choice: measure.our_ops(w, device, rep_ms, c),
            )
            yield (
                f"{workload.name}, peers, {choice}",
                lambda w=workload, c=choice: measure.peers(w, device, rep_ms, c, peers),
            )
    for workload in (w for w in LONG if w.name in names):
        yield workload.name, lambda w=workload: measure.long_forward(w, device)
    if "decode" in names:
        batches, contexts = (BATCHES[:1], QUICK_CONTEXTS) if quick else (BATCHES, CONTEXTS)
        yield "decode", lambda: measure_decode(batches, contexts)


def run(parts: Iterable[Section], about: Record, path: Path) -> tuple[list[Record], int]:
    """Records of all parts, saved after each of them; and how many parts broke."""
    records: list[Record] = []
    broken, start = 0, time.monotonic()
    for name, part in parts:
        try:
            for record in part():
                print(f"{record['name']:44s} {record['value']:10.3f} {record['unit']}", flush=True)
                records.append({**record, **about})
        except (RuntimeError, TritonError, RedGate) as error:
            broken += 1
            print(f"{name}: BROKEN: {type(error).__name__}: {error}", flush=True)
        torch.cuda.empty_cache()
        save(records, path)
        print(f"[{time.monotonic() - start:5.0f} s] {name}", flush=True)
    return records, broken


def stamp(device: str, commit: str | None, command: str) -> Record:
    """What every record says about where it comes from."""
    if commit is None:
        git = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
        done = subprocess.run(git, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() if done.returncode == 0 else "unknown"
    return {
        "device": torch.cuda.get_device_name(device) if device == "cuda" else "CPU",
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


def save(records: list[Record], path: Path) -> None:
    """Write the records as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    temporary.rename(path)


def main() -> int:
    every = [w.name for w in (*WORKLOADS, *LONG)] + ["decode"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help=f"only {', '.join(QUICK)} and a little decoding"
    )
    parser.add_argument("--only", nargs="+", choices=every, metavar="NAME", help=", ".join(every))
    parser.add_argument("--json", type=Path, help="default: results/ if whole, else runs/bench/")
    parser.add_argument("--commit", help="what to call this version where git cannot tell")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench: needs a CUDA or ROCm GPU; torch sees none", file=sys.stderr)
        return 2
    device = "cuda"
    names = set(arguments.only or ((*QUICK, "decode") if arguments.quick else every))
    is_whole = names == set(every) and not arguments.quick
    if is_whole and find_spec("matplotlib") is None:
        print("bench: the pictures need matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    command = "make bench" + (" ARGS=--quick" if arguments.quick else "")
    try:
        check_gate([w for w in WORKLOADS if w.name in names], device)
    except RedGate as error:
        print(f"bench: nothing is timed: {error}", file=sys.stderr)
        return 1
    parts = sections(names, device, list(installed_peers()), quick=arguments.quick)
    about = stamp(device, arguments.commit, command)
    default = ROOT / ("results" if is_whole else "runs/bench") / "kernels.json"
    records, broken = run(parts, about, arguments.json or default)
    if is_whole:
        write_page(records)
    print(render(records))
    if broken:
        print(f"bench: {broken} parts broke; see above", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
