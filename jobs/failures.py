"""What Ray Train's controller tells the driver: why a training worker failed.

The controller loads this file and nothing of the model, so it must stay light to import.
"""

from typing import Any

from ray.train import UserCallback
from ray.util.queue import Queue

# Of the workers that failed together, this many are named.
NAMED_FAILURES = 4


class FailureTeller(UserCallback):
    """Tells the driver which workers failed and why."""

    def __init__(self, events: Queue) -> None:
        self._events = events

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train before it decides whether to start the workers again."""
        for rank, error in sorted(worker_exceptions.items())[:NAMED_FAILURES]:
            self._events.put_nowait({"line": f"worker {rank} failed: {_failure(error)}"})


def _failure(error: Exception) -> str:
    """What happened, in a line: Ray Train hands on an error, a traceback's text or a health
    check's."""
    told = getattr(error, "health_check_failure", error)
    lines = str(told).strip().splitlines()
    if lines and lines[0].startswith("Traceback"):
        return lines[-1]
    name = type(told).__name__
    return f"{name}: {lines[0]}" if lines else name
