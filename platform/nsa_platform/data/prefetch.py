"""Steps read ahead in the background, so that a device never waits for data."""

import queue
import threading
from dataclasses import dataclass
from typing import Protocol

from nsa_platform.config.data import LoaderConfig
from nsa_platform.data.loader import Batch, LoaderState

DEPTH = 2
"""Steps that are ready before they are asked for."""


class Steps(Protocol):
    """Where a training loop gets its microbatches: a Loader, or one that reads ahead."""

    @property
    def config(self) -> LoaderConfig: ...

    def next_step(self, rows_per_step: int) -> list[Batch]:
        """This worker's microbatches of the next rows of all workers."""
        ...

    def state(self) -> LoaderState:
        """Where the next step begins."""
        ...


@dataclass(frozen=True, slots=True)
class _Ready:
    batches: list[Batch]
    after: LoaderState
    """Where the step after this one begins."""


class Prefetched:
    """The steps of a loader, which from now on nobody else may use.

    Every step has the same number of rows. `state` tells of the steps that were handed out, not of
    those that were read ahead. What the loader raises is raised by next_step in its turn.

    Args:
        pinned: keep the tensors where a GPU can fetch them while it computes.
    """

    def __init__(self, loader: Steps, rows_per_step: int, *, pinned: bool = False) -> None:
        self._loader = loader
        self._rows_per_step = rows_per_step
        self._pinned = pinned
        self._state = loader.state()
        self._ready: queue.Queue[_Ready | BaseException] = queue.Queue(DEPTH)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name="prefetch", daemon=True)
        self._thread.start()

    @property
    def config(self) -> LoaderConfig:
        """The loader's."""
        return self._loader.config

    def state(self) -> LoaderState:
        """Where the next step begins; the same on all workers."""
        return self._state

    def next_step(self, rows_per_step: int) -> list[Batch]:
        """This worker's microbatches of the next step; waits if they are not ready."""
        if rows_per_step != self._rows_per_step:
            raise ValueError(f"rows_per_step={rows_per_step} must be {self._rows_per_step}")
        ready = self._ready.get()
        if isinstance(ready, BaseException):
            self._ready.put(ready)
            raise ready
        self._state = ready.after
        return ready.batches

    def close(self) -> None:
        """Stop reading ahead."""
        self._is_closed.set()
        while not self._ready.empty():
            self._ready.get_nowait()
        self._thread.join()

    def _read(self) -> None:
        while not self._is_closed.is_set():
            try:
                batches = self._loader.next_step(self._rows_per_step)
                if self._pinned:
                    batches = [batch.pinned() for batch in batches]
                item = _Ready(batches, self._loader.state())
            # Whatever stops the reading is told to whoever waits for it.
            except BaseException as error:
                self._hand_over(error)
                return
            self._hand_over(item)

    def _hand_over(self, item: _Ready | BaseException) -> None:
        while not self._is_closed.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
