"""Training workers that must leave save their state first: at SIGTERM, and before a resize.

Ray Train's controller loads this file, so it must stay light to import.
"""

import time
from typing import Any

from ray.train.v2._internal.execution.callback import (
    ControllerCallback,
    WorkerCallback,
    WorkerGroupCallback,
)
from ray.util.queue import Queue

from nsa_platform.train.notice import TERMINATION

# Of a resize: longer than a step and a checkpoint of a large model take.
PATIENCE_S = 900.0
POLL_S = 0.2


class TerminationHeeder(WorkerCallback):
    """Installs the handler in each worker's main thread, before its training begins in another."""

    def after_init_train_context(self) -> None:
        """Called by Ray Train in the worker."""
        TERMINATION.install()


class ResizeSaver(WorkerGroupCallback, ControllerCallback):
    """Has an elastic run save its state before Ray Train ends its workers to start more."""

    def __init__(self, events: Queue) -> None:
        """events: on its way to the driver, which says what is told."""
        self._events = events
        self._group: Any = None

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """Called by Ray Train when the workers train."""
        self._group = worker_group

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Called by Ray Train, also when workers have failed: there is nobody to ask any more."""
        self._group = None

    def before_worker_group_abort(self, worker_group_context: Any) -> None:
        """Called by Ray Train when it gives up."""
        self._group = None

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Called by Ray Train before it starts workers, also in the place of failed ones."""
        group = self._group
        if group is None:
            return
        status = group.get_latest_poll_status()
        if status is None or status.errors or status.finished:
            return
        self._events.put_nowait(
            {"line": f"the cluster has room for {resize_decision.num_workers} workers"}
        )
        group.execute(_give_notice)
        deadline = time.monotonic() + PATIENCE_S
        while any(group.execute(_is_heeded)) and time.monotonic() < deadline:
            time.sleep(POLL_S)


def _give_notice() -> None:
    TERMINATION.give("the cluster has room for another number of workers")


def _is_heeded() -> bool:
    return TERMINATION.is_heeded
