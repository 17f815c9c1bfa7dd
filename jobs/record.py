"""Turn a recorded training run into a file under results/, and its loss curve into a picture.

    python -m jobs.record runs/nsa-150m --device "NVIDIA H100 80GB HBM3" --name nsa_150m_h100
    python -m jobs.record --draw results/nsa_150m_h100.json

Reads the run's finished.json and run.yaml and its MLflow run; writes results/NAME.json, from which
docs/NAME.png is drawn. Figures in the documents come from such records alone.
"""

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from jobs.cli import fail, read_record
from nsa_platform import figures
from nsa_platform.tracking import read_run

ROOT = Path(__file__).resolve().parents[1]
SUMMARY = {
    "train/loss": "nats per token",
    "valid/loss": "nats per token",
    "valid/bits_per_byte": "bits per byte",
    "train/tokens_per_s": "tokens/s",
    "train/mfu": "share of peak",
    "memory/max_allocated_gib": "GiB",
}
SERIES = ("train/loss", "valid/loss")


def record(folder: Path, *, name: str, device: str, uri: str | None = None) -> dict[str, Any]:
    """What a training run measured, with where and how, as one plain tree.

    Raises:
        OSError: the folder holds no finished run, or its MLflow store is not there.
    """
    finished = json.loads((folder / "finished.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    run = read_run(uri or finished["handle"]["uri"], finished["run_id"])
    tokens = config["train"]["tokens_per_step"]
    return {
        "name": name,
        "device": device,
        "commit": run.tags.get("mlflow.source.git.commit", ""),
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python -m jobs.pretrain --config jobs/configs/pretrain/{_stem(run.name)}.yaml",
        "model": config["model"]["name"],
        "context_length": config["data"]["context_length"],
        "steps": finished["step"],
        "records": [
            {"name": metric, "value": _last(metric, run.metrics[metric]), "unit": unit}
            for metric, unit in SUMMARY.items()
            if metric in run.metrics
        ],
        "series": {
            metric: [(step * tokens, value) for step, value in run.metrics.get(metric, [])]
            for metric in SERIES
        },
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """The loss curve of a result as a PNG."""
    title = f"{result['model']}, {result['context_length']:,} tokens of context, {result['device']}"
    curves = (result["series"][name] for name in SERIES)
    path.parent.mkdir(exist_ok=True)
    figures.loss_curve(*curves, title=title).savefig(path, dpi=110)


def _last(metric: str, points: list[tuple[int, float]]) -> float:
    """A rate's median over the run, anything else's last value."""
    if metric in ("train/tokens_per_s", "train/mfu"):
        return sorted(value for _, value in points)[len(points) // 2]
    return points[-1][1]


def _stem(run_name: str) -> str:
    return run_name.replace("-", "_")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the record and its picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, help="a training run's folder")
    parser.add_argument("--name", help="stem of the files that are written")
    parser.add_argument("--device", help="what it ran on")
    parser.add_argument("--uri", help="its MLflow store, if that has moved since")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="only draw this record again")
    options = parser.parse_args(argv)
    if options.draw is None and None in (options.folder, options.name, options.device):
        parser.error("give a folder, --name and --device, or --draw")
    if options.name and Path(options.name).name != options.name:
        parser.error(f"--name must be a plain name, got {options.name}")
    try:
        if options.draw is not None:
            result = read_record(options.draw)
        else:
            result = record(
                options.folder, name=options.name, device=options.device, uri=options.uri
            )
            target = ROOT / "results" / f"{options.name}.json"
            target.parent.mkdir(exist_ok=True)
            target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        picture = ROOT / "docs" / f"{result['name']}.png"
        draw(result, picture)
    except (OSError, ValueError, KeyError) as error:
        fail(f"no such record: {error}")
    print(f"{picture}")


if __name__ == "__main__":
    main()
