r"""Gate means of every layer over pretraining and fine-tuning: which branch weighs when.

    python -m jobs.gates runs/nsa-150m runs/nsa-150m-sft --json results/gates_nsa_150m.json \
        --picture docs/gates_nsa_150m.png
    python -m jobs.gates --draw results/gates_nsa_150m.json --picture X.png

Reads the MLflow runs of finished training runs, each of which began where the one before it ended;
steps are counted on. Prints the first and last gates; writes nothing but what --json and --picture
name.
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from jobs.cli import fail, interruptible, read_record, record_arguments, write_record
from nsa_platform import figures
from nsa_platform.tracking import read_run

NAME = "gates"
METRIC = "nsa/gate_mean/"

Means = dict[int, dict[int, dict[str, float]]]
"""Step -> layer -> branch -> mean gate."""


def record(folders: Sequence[Path], *, name: str = NAME, uri: str | None = None) -> dict[str, Any]:
    """The gates of runs one after the other, with where and how, as one plain tree.

    Raises:
        OSError: an MLflow store is not there.
        ValueError: a folder holds no finished run, a run has recorded no gates, or two have the
            same name.
    """
    records, phases, steps = [], [], 0
    commit, device = "", ""
    for folder in folders:
        finished = _finished(folder)
        run = read_run(uri or finished["handle"]["uri"], finished["run_id"])
        if run.name in (phase["run"] for phase in phases):
            raise ValueError(f"{folder}: its run {run.name} has the name of one before it")
        means = gate_means(run.metrics)
        if not means:
            raise ValueError(f"{folder}: its MLflow run has no {METRIC}... of any validation")
        phases.append(
            {
                "run": run.name,
                "begins": steps,
                "gates": [[steps + step, means[step]] for step in sorted(means)],
            }
        )
        for moment, step in (("first", min(means)), ("last", max(means))):
            records += [
                {"name": f"{run.name}/{branch}/{moment}", "value": value, "unit": "gate"}
                for branch, value in over_layers(means[step]).items()
            ]
        steps += finished["step"]
        commit, device = run.tags.get("mlflow.source.git.commit", ""), finished["device"]
    return {
        "name": name,
        "device": device,
        "commit": commit,
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", "jobs.gates", *(str(each) for each in folders)]),
        "records": records,
        "phases": phases,
    }


def _finished(folder: Path) -> dict[str, Any]:
    path = folder / "finished.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{folder}: holds no finished run ({path.name}: {error.strerror})"
        ) from None
    except ValueError:
        raise ValueError(f"{path} is not JSON") from None


def gate_means(metrics: dict[str, list[tuple[int, float]]]) -> Means:
    """The mean gates among a run's metrics."""
    found: Means = {}
    for metric, points in metrics.items():
        if metric.startswith(METRIC):
            branch, layer = metric.removeprefix(METRIC).split("/")
            for step, value in points:
                found.setdefault(step, {}).setdefault(int(layer), {})[branch] = value
    return found


def over_layers(layers: dict[int, dict[str, float]]) -> dict[str, float]:
    """The mean of each branch over layers."""
    branches = next(iter(layers.values()))
    return {branch: fmean(row[branch] for row in layers.values()) for branch in branches}


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel for each branch; lines stand where a run begins."""
    history = [
        (step, {int(layer): row for layer, row in layers.items()})
        for phase in result["phases"]
        for step, layers in phase["gates"]
    ]
    begins = {phase["run"]: phase["begins"] for phase in result["phases"][1:]}
    title = "Mean gate of each branch: " + ", then ".join(p["run"] for p in result["phases"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(figures.png(figures.gate_means(history, title=title, begins=begins)))


@interruptible("interrupted; the same command begins anew")
def main(argv: Sequence[str] | None = None) -> None:
    """Print the first and last gates, write what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="training runs, in their order")
    parser.add_argument("--uri", help="their MLflow store, if that has moved since")
    record_arguments(parser)
    options = parser.parse_args(argv)
    if bool(options.folders) is (options.draw is not None):
        parser.error("give either folders or --draw")
    if options.draw is not None and (options.json or not options.picture):
        parser.error("--draw goes with --picture, and not with --json")
    try:
        if options.draw is not None:
            result = read_record(options.draw)
            if "phases" not in result:
                raise ValueError(f"{options.draw} holds no gates: it has no phases")
        else:
            name = options.json.stem if options.json is not None else NAME
            result = record(options.folders, name=name, uri=options.uri)
        if options.json is not None:
            write_record(result, options.json)
        if options.picture is not None:
            draw(result, options.picture)
    except (OSError, ValueError) as error:
        fail(str(error))
    except KeyError as error:
        fail(f"{options.draw or options.folders[-1]} says no {error}")
    for each in result["records"]:
        print(f"{each['name']}: {each['value']:.3f}")


if __name__ == "__main__":
    main()
