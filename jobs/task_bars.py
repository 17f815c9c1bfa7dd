"""How far several tasks are: bars on a terminal, a plain line now and then elsewhere.

A worker moves the bars of its driver.
"""

import time
from datetime import timedelta
from typing import Any, Protocol

import ray
from ray.util.queue import Queue
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S = 5.0
SEND_EVERY_S = 0.5


class Bars(Protocol):
    """What work needs of bars."""

    def add_task(self, description: str, *, total: float) -> TaskID: ...

    def advance(self, task_id: TaskID, advance: float = 1) -> None: ...


class TaskBars(Progress):
    """Bars that vanish when all is done; lines stay."""

    def __init__(self) -> None:
        super().__init__(
            TextColumn("{task.description:>20}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            transient=True,
        )
        self._next_line_s = time.monotonic() + LINE_EVERY_S

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        if self.console.is_terminal or time.monotonic() < self._next_line_s:
            return
        self._next_line_s = time.monotonic() + LINE_EVERY_S
        task = next(task for task in self.tasks if task.id == task_id)
        text = f"{task.description}: {task.completed:,.0f} of {task.total or 0:,.0f}"
        if task.time_remaining:
            text += f", {timedelta(seconds=round(task.time_remaining))} left"
        self.line(text)

    def line(self, text: str) -> None:
        """Show one line and keep it."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class DistantBars:
    """Bars of the driver that watches this queue."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._tasks = 0
        self._unsent: dict[TaskID, float] = {}
        self._next_s = 0.0

    def add_task(self, description: str, *, total: float) -> TaskID:
        self._send()
        self._queue.put((description, total))
        self._tasks += 1
        return TaskID(self._tasks - 1)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        self._unsent[task_id] = self._unsent.get(task_id, 0) + advance
        if time.monotonic() >= self._next_s:
            self._send()

    def _send(self) -> None:
        for task_id, advance in self._unsent.items():
            self._queue.put((task_id, advance))
        self._unsent = {}
        self._next_s = time.monotonic() + SEND_EVERY_S


def watch(work: ray.ObjectRef, queue: Queue, bars: Bars) -> Any:
    """The result of a worker's work, whose DistantBars on this queue move the bars meanwhile."""
    tasks: list[TaskID] = []
    is_done = False
    while not is_done:
        # What was sent before the work was done is in the queue by then.
        is_done = bool(ray.wait([work], timeout=SEND_EVERY_S)[0])
        for task, amount in queue.get_nowait_batch(queue.qsize()):
            if isinstance(task, str):
                tasks.append(bars.add_task(task, total=amount))
            else:
                bars.advance(tasks[task], amount)
    return ray.get(work)
