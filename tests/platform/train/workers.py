"""Processes that train together. They are forked from one that has imported the platform: a process
that imports for itself takes seconds to do so."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

IMPORTED = ["nsa_platform.train.build", "nsa_platform.train.checkpoint", "nsa_platform.tracking"]


def start_workers(worker: Callable[..., None], *args: Any, size: int) -> None:
    """Call worker(rank, size, *args) in `size` processes and wait. What one raises is raised."""
    forkserver.set_forkserver_preload(IMPORTED)
    start_processes(worker, (size, *args), nprocs=size, start_method="forkserver")


@contextmanager
def group_of_one(folder: Path) -> Iterator[None]:
    """This process as the only one of a group that meets in an empty folder."""
    meeting = (folder / "file").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
