"""Bars: lines where there is no terminal, and a worker that moves its driver's bars."""

import pytest
import ray
from ray.util.queue import Queue
from rich.console import Console
from rich.progress import TaskID
from rich.text import Text

from jobs import task_bars
from jobs.cluster import connect
from jobs.task_bars import DistantBars, TaskBars, watch


def test_lines_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(task_bars, "LINE_EVERY_S", 0.0)
    with TaskBars() as bars:
        needles, text = bars.add_task("needles", total=3), bars.add_task("text", total=20)
        bars.advance(needles)
        bars.advance(text, 10)
        bars.advance(needles)
    lines = [line.split(", ")[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines == ["needles: 1 of 3", "text: 10 of 20", "needles: 2 of 3"]


def test_lines_come_now_and_then(capsys: pytest.CaptureFixture) -> None:
    with TaskBars() as bars:
        task = bars.add_task("needles", total=1000)
        for _ in range(1000):
            bars.advance(task)
    assert "needles" not in capsys.readouterr().out


def test_bars_have_counts_that_fit_a_narrow_terminal() -> None:
    bars = TaskBars()
    bars.advance(bars.add_task("unigram and bigram", total=4_000_000), 350_000)
    bars.advance(bars.add_task("minference: needles", total=40))
    console = Console(width=80, force_terminal=True)
    with console.capture() as captured:
        console.print(bars.get_renderable())
    first, second = Text.from_ansi(captured.get()).plain.splitlines()
    assert "unigram and bigram" in first and "350000/4000000" in first
    assert "minference: needles" in second and "1/40" in second


class Kept:
    """Bars that keep what they were told."""

    def __init__(self) -> None:
        self.tasks: list[list[float | str]] = []

    def add_task(self, description: str, *, total: float) -> TaskID:
        self.tasks.append([description, total, 0.0])
        return TaskID(len(self.tasks) - 1)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        done = self.tasks[task_id][2]
        assert isinstance(done, float)
        self.tasks[task_id][2] = done + advance


def test_a_worker_moves_the_bars_of_its_driver() -> None:
    class Ending(Kept):
        def add_task(self, description: str, *, total: float) -> TaskID:
            if description == "tasks":
                go_on.put(True)
            return super().add_task(description, total=total)

    def work(moved: DistantBars, go_on: Queue) -> str:
        first, second = moved.add_task("needles", total=500), moved.add_task("text", total=4096)
        for _ in range(500):
            moved.advance(first)
        moved.advance(second, 1024)
        # What was not sent yet goes before the next task.
        moved.add_task("tasks", total=1)
        go_on.get()
        return "done"

    bars = Ending()
    with connect():
        queue, go_on = (Queue(actor_options={"num_cpus": 0}) for _ in range(2))
        result = ray.remote(num_cpus=0)(work).remote(DistantBars(queue), go_on)
        assert watch(result, queue, bars) == "done"
        for each in (queue, go_on):
            each.shutdown(force=True)
    assert bars.tasks == [["needles", 500, 500.0], ["text", 4096, 1024.0], ["tasks", 1, 0.0]]
