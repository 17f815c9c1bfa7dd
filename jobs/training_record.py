"""What a training benchmark found as a plain tree: its points, and where and how it was done."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

from jobs.training_points import Point
from nsa_platform.config.runs import PretrainRun
from nsa_platform.model.cost import count_parameters
from nsa_platform.train.metrics import device_name
from nsa_platform.train.parallel import World
from nsa_platform.train.trial import Tried

ROOT = Path(__file__).resolve().parents[1]

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables of torch's allocator, on which it depends what fits."""
NAMES = {
    "train/tokens_per_s": "tokens_per_s",
    "train/tflops_per_worker": "tflops",
    "train/tflops_per_worker_dense": "tflops_dense",
    "train/mfu": "mfu",
    "train/mfu_dense": "mfu_dense",
    "memory/max_allocated_gib": "memory_gib",
    "memory/num_alloc_retries": "alloc_retries",
}
"""Of the training's metrics those that a record has, and their names there."""


def record_of(
    point: Point, recompute: str | None, tried: Tried | None, *, failure: str | None = None
) -> dict[str, Any]:
    """One point: what was found, or why there is nothing."""
    where = {
        "name": f"{point.attention}/{point.context}",
        "attention": point.attention,
        "context": point.context,
        "recompute": recompute,
    }
    if tried is None:
        return {**where, "failure": failure}
    metrics = tried.metrics
    return {
        **where,
        "value": metrics["train/tps_per_worker"],
        "unit": "tokens/s/GPU",
        "step_s": metrics["train/step_s"],
        "steps_s": tried.step_s,
        **{name: metrics[metric] for metric, name in NAMES.items() if metric in metrics},
        "compiled_graphs": tried.compiled_graphs,
        "graph_breaks": tried.graph_breaks,
    }


def about(
    run: PretrainRun, world: World, name: str, *, command: str, commit: str | None
) -> dict[str, Any]:
    """What holds for all points of one run of the benchmark."""
    assert run.model is not None
    starter = "python" if world.size == 1 else f"torchrun --nproc-per-node {world.size}"
    allocator = [f"{name}={os.environ[name]}" for name in ALLOCATOR if name in os.environ]
    return {
        "name": name,
        "model": run.model.name,
        "layers": run.model.layers,
        "parameters": count_parameters(run.model).total,
        "device": device_name(world.device),
        "workers": world.size,
        "mesh": run.train.mesh.describe(world.size) or f"state over {world.size}",
        "dtype": run.train.dtype,
        "compile": run.train.compile,
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
        },
        "commit": commit or _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join([*allocator, f"{starter} -m jobs.training_benchmark {command}"]),
    }


def _commit() -> str:
    git = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def write_record(record: dict[str, Any], path: Path) -> None:
    """Write it as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.rename(path)
