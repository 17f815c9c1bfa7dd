"""How far a training run is: a live line on a terminal, plain lines elsewhere."""

import math
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Without a terminal, steps are printed at most this often; validations always.
PLAIN_EVERY_S = 5.0


class TrainingProgress:
    """Shows steps and lines. A context manager."""

    def __init__(
        self, steps: int, console: Console | None = None, *, with_names: bool = False
    ) -> None:
        """with_names: say whose steps they are, for several runs."""
        self._steps = steps
        self._with_names = with_names
        self._prefix = ""
        self._console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._printed_s = 0.0
        self._loss = ""
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=self._console,
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("starting workers", total=self._steps, note="")
        else:
            self.line("starting workers")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, name: str, steps: int) -> None:
        """A run of so many steps begins."""
        self._steps = steps
        if self._with_names:
            self._prefix = f"{name} | "
            self.line(f"{self._prefix}begins, {steps} steps")
        if self._bar is not None and self._task is not None:
            self._bar.reset(self._task, total=steps)

    def line(self, text: str) -> None:
        """Show one line and keep it."""
        self._console.print(text, markup=False)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show where the run is; a validation stays as a line."""
        note = _note(metrics)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description="training", note=note)
        valid = _valid(metrics)
        is_due = time.monotonic() - self._printed_s >= PLAIN_EVERY_S or step == self._steps
        if valid:
            self.line(f"{self._prefix}step {step}/{self._steps} | {note} | {valid}")
        elif self._bar is None and is_due:
            left = self._remaining(step, metrics)
            self.line(f"{self._prefix}step {step}/{self._steps} | {note} | eta {left}")
        else:
            return
        self._printed_s = time.monotonic()

    def validated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show what the validation of a step's checkpoint has found."""
        self.line(f"{self._prefix}step {step}/{self._steps} | {_valid(metrics)}")

    def _remaining(self, step: int, metrics: Mapping[str, float]) -> str:
        seconds = round((self._steps - step) * metrics.get("train/step_s", 0.0))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _note(metrics: Mapping[str, float]) -> str:
    # Metrics hold finite numbers alone.
    loss = metrics.get("train/loss", math.nan)
    note = f"loss {loss:.3f} | {metrics['train/tokens_per_s']:,.0f} tokens/s"
    if "train/mfu" in metrics:
        note += f" | mfu {metrics['train/mfu']:.1%}"
    return note


def _valid(metrics: Mapping[str, float]) -> str:
    if "valid/loss" not in metrics:
        return ""
    text = f"held-out loss {metrics['valid/loss']:.3f}"
    if "valid/bits_per_byte" in metrics:
        text += f", {metrics['valid/bits_per_byte']:.3f} bits per byte"
    return text
