"""The workers that torchrun has started as a process group, or this process as a group of one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from nsa_platform.train.parallel import World

# A worker that fails alone leaves the others waiting so long.
PATIENCE = timedelta(minutes=5)


@contextmanager
def worker_group() -> Iterator[World]:
    """This worker among all of them, on a GPU of its own where there is one."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    with tempfile.TemporaryDirectory(prefix="workers-") as folder:
        if dist.is_torchelastic_launched():
            dist.init_process_group(backend, timeout=PATIENCE)
        else:
            meeting = f"file://{folder}/meeting"
            dist.init_process_group(backend, init_method=meeting, rank=0, world_size=1)
        try:
            yield World(dist.get_rank(), dist.get_world_size(), torch.device(device))
        finally:
            dist.destroy_process_group()
