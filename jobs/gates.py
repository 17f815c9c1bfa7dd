"""Gate means of every layer over pretraining and fine-tuning: which branch weighs when.

    python -m jobs.gates runs/nsa-150m runs/nsa-150m-sft --name gates_nsa_150m_h100

Reads the MLflow runs of finished training runs, each of which began where the one before it ended;
steps are counted on. Writes results/NAME.json and docs/NAME.png.
"""

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from jobs.cli import fail, read_record
from nsa_platform import figures
from nsa_platform.tracking import read_run

ROOT = Path(__file__).resolve().parents[1]
METRIC = "nsa/gate_mean/"

Means = dict[int, dict[int, dict[str, float]]]
"""Step -> layer -> branch -> mean gate."""


def record(folders: Sequence[Path], *, name: str, uri: str | None = None) -> dict[str, Any]:
    """The gates of runs one after the other, with where and how, as one plain tree.

    Raises:
        OSError: a folder holds no finished run, or its MLflow store is not there.
        ValueError: a run has recorded no gates.
    """
    records, phases, steps = [], [], 0
    commit, device = "", ""
    for folder in folders:
        finished = json.loads((folder / "finished.json").read_text(encoding="utf-8"))
        run = read_run(uri or finished["handle"]["uri"], finished["run_id"])
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
        "command": f"python -m jobs.gates {' '.join(f.name for f in folders)} --name {name}",
        "records": records,
        "phases": phases,
    }


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
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(figures.png(figures.gate_means(history, title=title, begins=begins)))


def main(argv: Sequence[str] | None = None) -> None:
    """Write the record and its picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="training runs, in their order")
    parser.add_argument("--name", help="stem of the files that are written")
    parser.add_argument("--uri", help="their MLflow store, if that has moved since")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="only draw this record again")
    options = parser.parse_args(argv)
    if options.draw is None and not (options.folders and options.name):
        parser.error("give folders and --name, or --draw")
    try:
        if options.draw is not None:
            result = read_record(options.draw)
        else:
            result = record(options.folders, name=options.name, uri=options.uri)
            target = ROOT / "results" / f"{options.name}.json"
            target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        picture = ROOT / "docs" / f"{result['name']}.png"
        draw(result, picture)
    except (OSError, ValueError, KeyError) as error:
        fail(f"no such record: {error}")
    for each in result["records"]:
        print(f"{each['name']}: {each['value']:.3f}")


if __name__ == "__main__":
    main()
