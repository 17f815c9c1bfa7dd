"""A profile of a few training steps: what ran when, which operators took the time, who had memory.

Steps are counted at the optimizer, so the loop knows nothing of it.
"""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

# The first steps compile, load and warm up.
FIRST_STEP = 4
NUM_STEPS = 3

FOLDER = "profile"
MOST_EVENTS = 200_000
OPERATORS = 60


class Artifacts(Protocol):
    """Where files of a run go; tracking's Tracker is one."""

    def log_text(self, text: str, path: str) -> None: ...
    def log_file(self, local: str | Path, folder: str = "") -> None: ...


@contextmanager
def profiled_steps(
    optimizer: torch.optim.Optimizer, artifacts: Artifacts, *, device: torch.device
) -> Iterator[None]:
    """Profile this worker's steps [FIRST_STEP, FIRST_STEP + NUM_STEPS) that the optimizer takes in
    the block.

    Writes profile/trace.json.gz (for Perfetto or chrome://tracing), profile/operators.txt and, on a
    GPU, profile/memory.pickle (for pytorch.org/memory_viz). What ran is made readable beside the
    steps that follow, at some 100 us an event; the block's end waits for it.
    """
    taken = 0
    keeping: threading.Thread | None = None
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    running = profile(activities=activities, record_shapes=True, profile_memory=True)

    def after_step(*_: Any) -> None:
        nonlocal taken, keeping
        taken += 1
        if taken == FIRST_STEP - 1:
            if device.type == "cuda":
                torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
            running.start()
        elif taken == FIRST_STEP - 1 + NUM_STEPS:
            running.stop()
            hook.remove()
            if device.type == "cuda":
                _keep_memory(artifacts)
            keeping = threading.Thread(target=_keep, args=(running, artifacts, device))
            keeping.start()

    hook = optimizer.register_step_post_hook(after_step)
    try:
        yield
    finally:
        hook.remove()
        if keeping is not None:
            keeping.join()


def _keep_memory(artifacts: Artifacts) -> None:
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        memory = Path(folder) / "memory.pickle"
        torch.cuda.memory._dump_snapshot(str(memory))
        torch.cuda.memory._record_memory_history(enabled=None)
        artifacts.log_file(memory, FOLDER)


def _keep(running: profile, artifacts: Artifacts, device: torch.device) -> None:
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        trace = Path(folder) / "trace.json.gz"
        running.export_chrome_trace(str(trace))
        artifacts.log_file(trace, FOLDER)
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = running.key_averages().table(sort_by=by, row_limit=OPERATORS)
    artifacts.log_text(table, f"{FOLDER}/operators.txt")
