r"""Needle grids of evaluations as one record and one picture: models, and policies, ranked.

    python -m jobs.needle_record 08dfac83... 1f7e1071... --uri sqlite:///runs/mlflow.db \
        --json results/needle_h100.json --picture docs/needle_h100.png

Takes the MLflow runs of jobs.evaluate, whose ids it prints at its end. The share of numbers that
a model writes exactly comes with Wilson's interval of 95 %, over the grid and for each length;
policies that were measured beside it follow under its name, the best first.
"""

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs.cli import fail, write_record
from nsa_platform import figures
from nsa_platform.evaluate.tasks.results import wilson
from nsa_platform.tracking import library, read_json, read_run

RESULTS = "evaluation/results.json"
UNIT = "share of numbers"


def record(run_ids: Sequence[str], *, uri: str) -> dict[str, Any]:
    """The grids of these runs, the best first, with where and how.

    Raises:
        ValueError: a run stands twice, or has no needles.
        OSError: the store or a run's results cannot be read.
    """
    if len(set(run_ids)) < len(run_ids):
        raise ValueError("a run must be named once")
    grids, commits, devices = [], set(), set()
    for run_id in run_ids:
        run, results = read_run(uri, run_id), read_json(uri, run_id, RESULTS)
        if results.get("needle") is None:
            raise ValueError(f"{run.name}: its evaluation had no needles")
        try:
            grids.append({"run": run.name, "run_id": run_id, **_grid(results)})
            devices.add(results["device"])
        except KeyError as error:
            raise ValueError(f"{run.name}: its results say no {error}: evaluate anew") from None
        commits.add(run.tags.get("mlflow.source.git.commit", "unknown")[:12])
    grids.sort(key=lambda grid: -grid["exact"])
    return {
        "device": ", ".join(sorted(devices)),
        "commit": ", ".join(sorted(commits)),
        "date": datetime.now(UTC).date().isoformat(),
        "records": [each for grid in grids for each in _records(grid)],
        "grids": grids,
    }


def _grid(results: dict[str, Any]) -> dict[str, Any]:
    """Scores of the needles in each cell, [depth][length], and what policies made of them."""
    trials = results["needle"]["trials"]
    lengths = sorted({trial["length"] for trial in trials})
    depths = sorted({trial["depth"] for trial in trials})
    cells: list[list[list[float]]] = [[[] for _ in lengths] for _ in depths]
    for trial in trials:
        place = depths.index(trial["depth"]), lengths.index(trial["length"])
        cells[place[0]][place[1]].append(float(trial["exact"]))
    policies = {
        name: {"exact": each["needle_exact"], "interval": each["intervals"]["needle_exact"]}
        for name, each in (results.get("baselines") or {}).items()
    }
    exact = results["needle"]["exact"]
    return {
        "exact": exact, "lengths": lengths, "depths": depths, "cells": cells, "policies": policies
    }  # fmt: skip


def _records(grid: dict[str, Any]) -> list[dict[str, Any]]:
    name = f"{grid['run']}/needle_exact"
    by_length: list[list[float]] = [
        [score for cell in column for score in cell] for column in zip(*grid["cells"], strict=True)
    ]
    found = [_share(name, [score for scores in by_length for score in scores])]
    for length, scores in zip(grid["lengths"], by_length, strict=True):
        found.append(_share(f"{name}/{length}", scores))
    for policy, each in sorted(grid["policies"].items(), key=lambda item: -item[1]["exact"]):
        low, high = each["interval"]
        found.append(_record(f"{name}/{policy}", each["exact"], low, high))
    return found


def _share(name: str, scores: Sequence[float]) -> dict[str, Any]:
    low, high = wilson(scores)
    return {**_record(name, sum(scores) / len(scores), low, high), "needles": len(scores)}


def _record(name: str, value: float, low: float, high: float) -> dict[str, Any]:
    return {"name": name, "value": value, "low": low, "high": high, "unit": UNIT}


def draw(result: dict[str, Any]) -> bytes:
    """A map for each run, the best first."""
    maps = {
        f"{grid['run']}: {grid['exact']:.1%}": (
            grid["lengths"],
            grid["depths"],
            [[sum(cell) / len(cell) for cell in row] for row in grid["cells"]],
        )
        for grid in result["grids"]
    }
    return figures.png(figures.needle_maps(maps, title="Needles: numbers written exactly"))


def main(argv: Sequence[str] | None = None) -> None:
    """Write the record and its picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_ID", help="MLflow runs of evaluations")
    parser.add_argument("--uri", required=True, help="their MLflow store")
    parser.add_argument("--json", type=Path, required=True, help="the record to write")
    parser.add_argument("--picture", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--commit", help="of the code, where the runs do not say")
    options = parser.parse_args(argv)
    try:
        found = record(options.runs, uri=options.uri)
        command = f"python -m jobs.needle_record {' '.join(options.runs)} --uri {options.uri}"
        result = {"name": options.json.stem, "command": command, **found}
        result["commit"] = options.commit or result["commit"]
        write_record(result, options.json)
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        options.picture.write_bytes(draw(result))
    except (OSError, ValueError, library.MlflowException) as error:
        fail(str(error))
    for each in result["records"]:
        print(f"{each['name']}: {each['value']:.3f} ({each['low']:.3f} to {each['high']:.3f})")


if __name__ == "__main__":
    main()
