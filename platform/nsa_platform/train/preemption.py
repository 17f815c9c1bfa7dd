"""A worker is about to be taken away: all workers save at the same step, then leave.

A notice reaches one worker. They tell each other after each step, so that all act on it together.
"""

from typing import Any

import torch
import torch.distributed as dist

from nsa_platform.train.notice import Notice
from nsa_platform.train.parallel import World


class TrainingPreempted(RuntimeError):
    """The run has saved its state and gives up its workers; who starts it again loses nothing."""


class Preemption:
    """What all workers know of each other's notices.

    Args:
        notice: this worker's own.
    """

    def __init__(self, world: World, notice: Notice) -> None:
        self._world = world
        self._notice = notice
        # Its own group, on the CPU: the answer must not wait behind what a device has to do.
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self._group = group

    def agreed(self) -> bool:
        """Whether any worker has had a notice. Every worker calls it; all get the same answer."""
        flag = torch.tensor(int(self._notice() is not None))
        dist.all_reduce(flag, group=self._group)
        return bool(flag)

    def reasons(self) -> str:
        """Which workers must leave and why. Every worker calls it."""
        gathered: list[Any] = [None] * self._world.size
        dist.all_gather_object(gathered, self._notice(), group=self._group)
        return "; ".join(f"worker {i}: {why}" for i, why in enumerate(gathered) if why)
