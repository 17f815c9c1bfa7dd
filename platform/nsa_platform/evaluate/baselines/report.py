"""Policies beside the model in an MLflow run: metrics, tables, two figures, plain values."""

from collections import Counter
from dataclasses import asdict, fields
from statistics import fmean
from typing import Any

from nsa_platform import figures
from nsa_platform.evaluate.baselines.comparison import PolicyResult
from nsa_platform.evaluate.bits_per_byte import BitsPerByte
from nsa_platform.evaluate.report import MODEL, UNIT
from nsa_platform.evaluate.tasks.results import Score, bootstrap, wilson
from nsa_platform.tracking import Tracker

FOLDER = "evaluation"
READINGS = ("exact", "tokens", "lift")


def record_policy(tracker: Tracker, name: str, result: PolicyResult, *, step: int) -> None:
    """eval/baselines/<policy>/... of one policy, as soon as it is measured."""
    metrics = _metrics(result).items()
    tracker.log_metrics({f"eval/baselines/{name}/{key}": value for key, value in metrics}, step)


def record_baselines(
    tracker: Tracker, results: dict[str, PolicyResult], *, own: PolicyResult
) -> None:
    """Tables of results, reads and trials of all policies, figures with the model.

    Args:
        own: what the model itself made of all this, by its own attention.
    """
    _record_reads(tracker, results)
    _record_patterns(tracker, results)
    everybody = {MODEL: own, **results}
    if own.bits is not None:
        _record_text(tracker, everybody)
    if own.grid is not None:
        _record_needles(tracker, everybody)
    if own.tasks:
        _record_tasks(tracker, everybody)


def baselines_summary(results: dict[str, PolicyResult]) -> dict[str, Any]:
    """The results as plain values."""
    return {
        name: {
            **_metrics(result),
            **({"by_position": _by_position(result.bits)} if result.bits is not None else {}),
            "intervals": _intervals(result),
            "reads": [asdict(each) for each in result.reads],
            **({"patterns": _pattern_counts(result)} if result.patterns else {}),
        }
        for name, result in results.items()
    }


def _metrics(result: PolicyResult) -> dict[str, float]:
    found = {}
    if result.bits is not None and result.bits.total.bits_per_byte is not None:
        found["bits_per_byte"] = result.bits.total.bits_per_byte
    if result.grid is not None:
        found |= {f"needle_{name}": result.grid.mean(name) for name in READINGS}
    for task in result.tasks:
        found |= {f"{task.name}/{cell}": score.mean for cell, score in task.cells.items()}
    for reads in result.reads:
        where = f"{reads.task}/{reads.phase}"
        if reads.length is not None:
            where += f"/{reads.length}"
        found[f"{where}/keys_per_query"] = reads.count.keys_per_query
        found[f"{where}/union_per_group"] = reads.count.union_per_group
        found[f"{where}/bytes_per_step"] = reads.count.bytes_per_step
    return found


def _intervals(result: PolicyResult) -> dict[str, tuple[float, float]]:
    """Intervals of 95 % of the metrics that have one."""
    found = {}
    if result.grid is not None:
        for name in ("exact", "tokens"):
            readings = [float(getattr(trial, name)) for trial in result.grid.trials]
            found[f"needle_{name}"] = _interval(readings)
    for task in result.tasks:
        found |= {f"{task.name}/{cell}": (of.low, of.high) for cell, of in task.cells.items()}
    return found


def _interval(readings: list[float]) -> tuple[float, float]:
    """Of readings that are all equal nothing can be drawn anew: Wilson's, as for tasks."""
    is_share = set(readings) <= {0.0, 1.0} or len(set(readings)) == 1 < len(readings)
    return wilson(readings) if is_share else bootstrap(readings)


def _record_reads(tracker: Tracker, results: dict[str, PolicyResult]) -> None:
    rows = [
        [name, each.task, each.length, each.phase, *asdict(each.count).values()]
        for name, result in results.items()
        for each in result.reads
    ]
    counts = ["queries", "keys per query", "union per group", "bytes per step"]
    columns = ["policy", "task", "length", "phase", *counts]
    tracker.log_table(columns, rows, f"{FOLDER}/baselines_reads.json")


def _record_patterns(tracker: Tracker, results: dict[str, PolicyResult]) -> None:
    """The pattern that a search has found for each head."""
    rows = [
        [name, layer, head, str(found.pattern), found.share, found.error]
        for name, result in results.items()
        for layer, heads in enumerate(result.patterns)
        for head, found in enumerate(heads)
    ]
    if rows:
        columns = ["policy", "layer", "head", "pattern", "share of pairs", "error of output"]
        tracker.log_table(columns, rows, f"{FOLDER}/baselines_patterns.json")


def _pattern_counts(result: PolicyResult) -> dict[str, int]:
    """Heads of each kind of pattern."""
    return dict(Counter(type(each.pattern).__name__ for heads in result.patterns for each in heads))


def _record_text(tracker: Tracker, everybody: dict[str, PolicyResult]) -> None:
    """Bits per byte by position, a column for each; one bar for each."""
    known = {
        name: (result.bits, result.bits.total.bits_per_byte)
        for name, result in everybody.items()
        if result.bits is not None and result.bits.total.bits_per_byte is not None
    }
    if not known:
        return
    edges = next(iter(known.values()))[0].edges
    parts = zip(
        edges[:-1], edges[1:], *(_by_position(bits) for bits, _ in known.values()), strict=True
    )
    tracker.log_table(
        ["from position", "to position", *(f"{name} ({UNIT})" for name in known)],
        [list(row) for row in parts],
        f"{FOLDER}/baselines_bits_per_byte_by_position.json",
    )
    figure = figures.bars(
        list(known),
        [total for _, total in known.values()],
        unit=f"{UNIT} (lower is better)",
        title="Held-out text, read through policies",
    )
    tracker.log_figure(figure, f"{FOLDER}/baselines_bits_per_byte.png")


def _record_needles(tracker: Tracker, everybody: dict[str, PolicyResult]) -> None:
    """All trials; the share of exact numbers by length, with its interval; a heat map of it."""
    grids = {name: each.grid for name, each in everybody.items() if each.grid is not None}
    trials = [(name, trial) for name, grid in grids.items() for trial in grid.trials]
    columns = ["policy", *asdict(trials[0][1])]
    rows = [[name, *asdict(trial).values()] for name, trial in trials]
    tracker.log_table(columns, rows, f"{FOLDER}/baselines_needle_trials.json")

    lengths = next(iter(grids.values())).lengths
    table, cells = [], []
    for name, grid in grids.items():
        cells.append([])
        for length in lengths:
            exact = [trial.exact for trial in grid.trials if trial.length == length]
            mean = sum(exact) / len(exact)
            table.append([name, length, len(exact), mean, *_interval(exact)])
            cells[-1].append(mean)
    columns = ["policy", "length", "needles", "exact", "low (95 %)", "high (95 %)"]
    tracker.log_table(columns, table, f"{FOLDER}/baselines_needle.json")
    figure = figures.scores(
        list(grids),
        [f"{length:,}" for length in lengths],
        cells,
        title="Needles written exactly, read through policies",
    )
    tracker.log_figure(figure, f"{FOLDER}/baselines_needle.png")


def _record_tasks(tracker: Tracker, everybody: dict[str, PolicyResult]) -> None:
    """Each cell of each task with its interval; one bar for each policy."""
    rows = [
        [name, task.name, cell, *asdict(score).values()]
        for name, result in everybody.items()
        for task in result.tasks
        for cell, score in task.cells.items()
    ]
    columns = ["policy", "task", "cell", *(each.name for each in fields(Score))]
    tracker.log_table(columns, rows, f"{FOLDER}/baselines_tasks.json")
    figure = figures.bars(
        list(everybody),
        [fmean(task.mean for task in result.tasks) for result in everybody.values()],
        unit="mean score of the tasks, 0 to 1",
        title="Tasks, read through policies",
    )
    tracker.log_figure(figure, f"{FOLDER}/baselines_tasks.png")


def _by_position(bits: BitsPerByte) -> list[float | None]:
    return [part.bits_per_byte for part in bits.parts]
