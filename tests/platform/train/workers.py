"""Processes that train together. They are forked from one that has imported the platform: a process
that imports for itself takes seconds to do so."""

from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

from torch.multiprocessing.spawn import start_processes

IMPORTED = ["nsa_platform.train.build", "nsa_platform.train.checkpoint", "nsa_platform.tracking"]


def start_workers(worker: Callable[..., None], *args: Any, size: int) -> None:
    """Call worker(rank, size, *args) in `size` processes and wait. What one raises is raised."""
    forkserver.set_forkserver_preload(IMPORTED)
    start_processes(worker, (size, *args), nprocs=size, start_method="forkserver")
