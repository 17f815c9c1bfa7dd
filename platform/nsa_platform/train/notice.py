"""Notices that a worker is about to be taken away; among them SIGTERM, told to its process.

Ray Train's controller loads this file, so it must stay light to import.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Notice = Callable[[], str | None]
"""Says why this worker must leave, or None."""


class TerminationNotice:
    """SIGTERM as a notice while somebody heeds it; otherwise it does what it did before.

    One instance for a process. `install` runs in the main thread, where signals arrive; training
    may run in another.
    """

    def __init__(self) -> None:
        self.is_heeded = False
        """Whether somebody looks at it after each step."""
        self._reason: str | None = None
        self._before: Any = signal.SIG_DFL

    def install(self) -> None:
        """Take over SIGTERM."""
        self._before = signal.signal(signal.SIGTERM, self._handle)

    def __call__(self) -> str | None:
        return self._reason

    def give(self, reason: str) -> None:
        """Notice from within the process."""
        self._reason = reason

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """For a time in which this notice is looked at after each step."""
        self.is_heeded = True
        try:
            yield
        finally:
            self.is_heeded = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """The first signal is a notice, any further one an order."""
        if self.is_heeded and self._reason is None:
            self.give("it was told to end (SIGTERM)")
        elif callable(self._before):
            self._before(number, frame)
        else:
            signal.signal(signal.SIGTERM, self._before)
            signal.raise_signal(signal.SIGTERM)


TERMINATION = TerminationNotice()
"""Of this process, whoever trains in it."""
