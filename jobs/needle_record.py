r"""Needle grids of evaluations as one record and one picture: models, and policies, ranked.

    python -m jobs.needle_record 08dfac83... 1f7e1071... --uri sqlite:///runs/mlflow.db \
        --json results/needle_h100.json --picture docs/needle_h100.png
    python -m jobs.needle_record full nsa --draw results/needle_h100.json X.json --picture X.png

Takes the MLflow runs of jobs.evaluate, whose ids it prints at its end. The share of numbers that
a model writes exactly comes with Wilson's interval of 95 %, over the grid and for each length;
policies that were measured beside it follow under its name, the best first, each with a map of its
own and with what it read at each length, per query and as the union over a group. With --draw the
maps of such records are drawn again, of the runs that are named or of all.
"""

import argparse
import shlex
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs.cli import fail, interruptible, read_record, write_record
from nsa_platform import figures
from nsa_platform.evaluate.tasks.results import wilson
from nsa_platform.tracking import library, read_json, read_run

RESULTS = "evaluation/results.json"
TRIALS = "evaluation/baselines_needle_trials.json"
UNIT = "share of numbers"


def record(run_ids: Sequence[str], *, uri: str) -> dict[str, Any]:
    """The grids of these runs, the best first, with where and how.

    Raises:
        ValueError: a run stands twice, two have the same name, or one has no needles.
        OSError: the store or a run's results cannot be read.
    """
    if len(set(run_ids)) < len(run_ids):
        raise ValueError("a run must be named once")
    grids, commits, devices = [], set(), set()
    for run_id in run_ids:
        run = read_run(uri, run_id)
        if (job := run.tags.get("nsa.job")) != "evaluate":
            raise ValueError(f"{run.name}: must be a run of jobs.evaluate, is one of {job}")
        results = read_json(uri, run_id, RESULTS)
        if results.get("needle") is None:
            raise ValueError(f"{run.name}: its evaluation had no needles")
        try:
            grid = {"run": run.name, "run_id": run_id, **_grid(results["needle"])}
            if results.get("baselines"):
                table = read_json(uri, run_id, TRIALS)
                grid["policies"] = _policies(grid, results["baselines"], table)
            grids.append(grid)
            devices.add(results["device"])
        except KeyError as error:
            raise ValueError(f"{run.name}: its results say no {error}: evaluate anew") from None
        commits.add(run.tags.get("mlflow.source.git.commit", "unknown")[:12])
    grids.sort(key=lambda grid: -grid["exact"])
    _check_names([grid["run"] for grid in grids])
    return {
        "device": ", ".join(sorted(devices)),
        "commit": ", ".join(sorted(commits)),
        "date": datetime.now(UTC).date().isoformat(),
        "records": [
            {**each, "run_id": grid["run_id"]} for grid in grids for each in _records(grid)
        ],
        "grids": grids,
    }


def _check_names(names: Sequence[str]) -> None:
    """What is recorded and drawn of runs is told apart by their names."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"runs must not have the same name: {', '.join(twice)}")


def _grid(needle: dict[str, Any]) -> dict[str, Any]:
    """Scores of a model's needles in each cell, [depth][length]."""
    trials = needle["trials"]
    lengths = sorted({trial["length"] for trial in trials})
    depths = sorted({trial["depth"] for trial in trials})
    cells = _cells(trials, lengths, depths)
    return {
        "exact": needle["exact"], "lengths": lengths, "depths": depths, "cells": cells,
        "policies": {},
    }  # fmt: skip


def _policies(
    grid: dict[str, Any], baselines: dict[str, Any], table: dict[str, Any]
) -> dict[str, Any]:
    """What policies made of the same needles, the best first."""
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    ranked = sorted(baselines.items(), key=lambda item: -item[1]["needle_exact"])
    return {
        name: {
            "exact": each["needle_exact"],
            "interval": each["intervals"]["needle_exact"],
            "cells": _cells(
                (row for row in rows if row["policy"] == name), grid["lengths"], grid["depths"]
            ),
            "reads": each["reads"],
        }
        for name, each in ranked
    }


def _cells(
    trials: Iterable[dict[str, Any]], lengths: list[int], depths: list[float]
) -> list[list[list[float]]]:
    cells: list[list[list[float]]] = [[[] for _ in lengths] for _ in depths]
    for trial in trials:
        row, column = depths.index(trial["depth"]), lengths.index(trial["length"])
        cells[row][column].append(float(trial["exact"]))
    return cells


def _records(grid: dict[str, Any]) -> list[dict[str, Any]]:
    name = f"{grid['run']}/needle_exact"
    by_length: list[list[float]] = [
        [score for cell in column for score in cell] for column in zip(*grid["cells"], strict=True)
    ]
    found = [_share(name, [score for scores in by_length for score in scores])]
    for length, scores in zip(grid["lengths"], by_length, strict=True):
        found.append(_share(f"{name}/{length}", scores))
    for policy, each in grid["policies"].items():
        low, high = each["interval"]
        found.append(_record(f"{name}/{policy}", each["exact"], low, high))
        found += [
            {
                "name": f"{grid['run']}/{policy}/{read['phase']}/{read['length']}",
                "value": read["count"]["keys_per_query"],
                "unit": "keys per query",
                **read["count"],
            }
            for read in each["reads"]
            if read["task"] == "needle"
        ]
    return found


def _share(name: str, scores: Sequence[float]) -> dict[str, Any]:
    low, high = wilson(scores)
    return {**_record(name, sum(scores) / len(scores), low, high), "needles": len(scores)}


def _record(name: str, value: float, low: float, high: float) -> dict[str, Any]:
    return {"name": name, "value": value, "low": low, "high": high, "unit": UNIT}


def stored_grids(paths: Sequence[Path], names: Sequence[str]) -> list[dict[str, Any]]:
    """The grids of these runs, in their order, out of records; without names all there are.

    A run whose name stands in several records is called RECORD/RUN.

    Raises:
        OSError: a record cannot be read.
        ValueError: one holds no needles, there is no such run, one is named twice, or two records
            of one name have runs of one name.
    """
    found = [(path, grid) for path in paths for grid in _grids_of(path)]
    runs = [grid["run"] for _, grid in found]
    labels = [
        grid["run"] if runs.count(grid["run"]) == 1 else f"{path.stem}/{grid['run']}"
        for path, grid in found
    ]
    _check_names(labels)
    known = dict(zip(labels, (grid for _, grid in found), strict=True))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no run {', '.join(unknown)}: there are {', '.join(known)}")
    if len(set(names)) < len(names):
        raise ValueError("a run must be named once")
    return [{**known[name], "run": name} for name in names or known]


def _grids_of(path: Path) -> list[dict[str, Any]]:
    grids = read_record(path).get("grids")
    parts = {"run", "exact", "lengths", "depths", "cells", "policies"}
    if not isinstance(grids, list) or not all(
        isinstance(grid, dict) and parts <= grid.keys() for grid in grids
    ):
        raise ValueError(f"{path} holds no needles: it has no grids")
    return grids


def draw(grids: Sequence[dict[str, Any]]) -> bytes:
    """A map for each run, and behind it one for each policy."""
    maps = {}
    for grid in grids:
        for name, each in {"": grid, **grid["policies"]}.items():
            run = grid["run"] if len(grids) > 1 or not name else ""
            title = f"{run} {name}".strip() + f": {each['exact']:.1%}"
            shares = [[sum(cell) / len(cell) for cell in row] for row in each["cells"]]
            maps[title] = grid["lengths"], grid["depths"], shares
    return figures.png(figures.needle_maps(maps, title="Needles: numbers written exactly"))


def _recorded(options: argparse.Namespace) -> dict[str, Any]:
    """The record of the runs that are named."""
    found = record(options.runs, uri=options.uri)
    flags = ["--uri", options.uri, "--json", str(options.json), "--picture", str(options.picture)]
    command = shlex.join(["python", "-m", "jobs.needle_record", *options.runs, *flags])
    result = {"name": options.json.stem, "command": command, **found}
    result["commit"] = options.commit or result["commit"]
    return result


@interruptible("interrupted; the same command begins anew")
def main(argv: Sequence[str] | None = None) -> None:
    """Write the record and its picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="ids of MLflow runs of evaluations; with --draw the names of runs",
    )
    parser.add_argument("--uri", help="their MLflow store")
    parser.add_argument("--json", type=Path, help="the record to write")
    parser.add_argument("--picture", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--commit", help="of the code, where the runs do not say")
    parser.add_argument(
        "--draw", type=Path, nargs="+", metavar="JSON", help="only draw these records again"
    )
    options = parser.parse_args(argv)
    if options.draw and (options.uri or options.json or options.commit):
        parser.error("--draw goes with --picture, and not with --uri, --json or --commit")
    if not options.draw and not (options.runs and options.uri and options.json):
        parser.error("give ids of runs, --uri and --json, or --draw")
    try:
        result = None if options.draw else _recorded(options)
        grids = result["grids"] if result else stored_grids(options.draw, options.runs)
        picture = draw(grids)
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        options.picture.write_bytes(picture)
        if result:
            write_record(result, options.json)
    except (ArithmeticError, LookupError, TypeError) as error:
        fail(f"{', '.join(map(str, options.draw or options.runs))}: no grid of needles ({error!r})")
    except (OSError, ValueError, library.MlflowException) as error:
        fail(str(error))
    for each in result["records"] if result else ():
        interval = f" ({each['low']:.3f} to {each['high']:.3f})" if "low" in each else ""
        print(f"{each['name']}: {each['value']:,.3f}{interval} {each['unit']}")


if __name__ == "__main__":
    main()
