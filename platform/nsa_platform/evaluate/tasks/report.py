"""Results of tasks into an MLflow run: metrics, tables, figures, plain values."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nsa_platform import figures
from nsa_platform.evaluate.tasks.results import Row, TaskResult
from nsa_platform.tracking import Tracker

FOLDER = "evaluation"


def record_task(tracker: Tracker, result: TaskResult, step: int) -> None:
    """eval/<task>/<cell> and eval/<task>/mean, tables of cells and of answers, a figure."""
    cells = result.cells
    tracker.log_metrics(
        {
            **{f"eval/{result.name}/{cell}": score.mean for cell, score in cells.items()},
            f"eval/{result.name}/mean": result.mean,
        },
        step,
    )
    names = ["cell", *list(asdict(next(iter(cells.values()))))]
    table = [[cell, *asdict(score).values()] for cell, score in cells.items()]
    tracker.log_table(names, table, f"{FOLDER}/{result.name}.json")
    rows = [list({**asdict(row), **_joined(row)}.values()) for row in result.rows]
    columns = list(asdict(result.rows[0]))
    tracker.log_table(columns, rows, f"{FOLDER}/{result.name}_answers.json")
    figure = figures.bars(
        list(cells),
        [score.mean for score in cells.values()],
        intervals=[(score.low, score.high) for score in cells.values()],
        unit="score, 0 to 1, with its interval of 95 %",
        title=f"{result.name}: mean {result.mean:.3f} of {len(result.rows):,} samples",
    )
    tracker.log_figure(figure, f"{FOLDER}/{result.name}.png")


def _joined(row: Row) -> dict[str, str]:
    return {"cells": "; ".join(row.cells), "references": "; ".join(row.references)}


def record_overview(tracker: Tracker, results: Sequence[TaskResult]) -> None:
    """One heat map of tasks that are measured by length: that is what their cells are."""
    scores = {
        result.name: {int(cell): score.mean for cell, score in result.cells.items()}
        for result in results
    }
    if not scores:
        return
    lengths = sorted({length for by_length in scores.values() for length in by_length})
    figure = figures.scores(
        list(scores),
        [f"{length:,}" for length in lengths],
        [[by_length.get(length) for length in lengths] for by_length in scores.values()],
        title="Tasks by length",
    )
    tracker.log_figure(figure, f"{FOLDER}/tasks.png")


def task_summary(result: TaskResult) -> dict[str, Any]:
    """A result as plain values, without the answers."""
    cells = {cell: asdict(score) for cell, score in result.cells.items()}
    return {"mean": result.mean, "cells": cells}
