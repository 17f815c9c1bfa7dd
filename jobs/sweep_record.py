"""What the runs of a sweep have come to, side by side: results.json, a report and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from jobs.run_report import REPORT, markdown_table
from jobs.training_inputs import find_origin, private_folder, run_folder
from nsa_platform import figures, storage
from nsa_platform.config.runs import PretrainRun, SweepRun
from nsa_platform.model.cost import count_parameters
from nsa_platform.tracking import Tracker, open_parent, origin_tags
from nsa_platform.train.history import History
from nsa_platform.train.snapshot_validation import read_validations
from nsa_platform.train.snapshots import newest_facts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = "results.json"
# Student's t at 95 %, two-sided, by degrees of freedom. A training machine needs no SciPy for it.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
POSITIONS = "valid/loss_at/"

COLUMNS = {
    "valid/loss": "held-out loss, nats per token",
    "valid/bits_per_byte": "bits per byte",
    "train/tokens_per_s": "tokens per second",
    "memory/max_allocated_gib": "GPU memory, GiB",
}
"""What a variant is summed up by."""


@dataclass
class Trial:
    """A run of a sweep."""

    variant: str
    seed: int
    run: PretrainRun
    finished: dict[str, Any] | None = None
    """What its finished.json holds."""


def record_of(config: SweepRun, trials: Sequence[Trial]) -> dict[str, Any]:
    """Every finished run with its curves, and the summary of each variant, as one plain tree."""
    done = [_trial_record(trial) for trial in trials if trial.finished is not None]
    first = trials[0].run
    return {
        "name": config.name,
        "device": done[0]["device"] if done else None,
        "commit": origin_tags("sweep", "").get("mlflow.source.git.commit", ""),
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python -m jobs.sweep --config X.yaml, with the configuration below",
        "config": config.model_dump(mode="json"),
        "context_length": first.in_stages()[-1].data.context_length,
        "runs": len(trials),
        "summary": [
            summary_of(variant.name, done, config.variants[0].name) for variant in config.variants
        ],
        "trials": done,
    }


def _trial_record(trial: Trial) -> dict[str, Any]:
    assert trial.finished is not None
    facts = newest_facts(storage.join(run_folder(trial.run), "checkpoints")) or {}
    history = History.from_dict(facts["history"]) if facts else History()
    history.add_validations(read_validations(run_folder(trial.run)))
    # Of the last step; an attempt that found nothing left to do has seen none.
    metrics = facts.get("metrics", {}) | trial.finished["metrics"]
    return {
        "variant": trial.variant,
        "seed": trial.seed,
        "run_id": trial.finished["run_id"],
        "device": trial.finished["device"],
        "parameters": count_parameters(find_origin(trial.run).model).total,
        "steps": trial.finished["step"],
        "tokens": facts.get("tokens"),
        "seconds": trial.finished["seconds"],
        "metrics": metrics,
        "train": history.train,
        "valid": history.valid,
        "health": history.health,
    }


def summary_of(variant: str, done: Sequence[Mapping[str, Any]], first: str) -> dict[str, Any]:
    """Mean and interval over seeds of each column, and of the difference to the first variant with
    the same seed."""
    mine = {trial["seed"]: trial["metrics"] for trial in done if trial["variant"] == variant}
    theirs = {trial["seed"]: trial["metrics"] for trial in done if trial["variant"] == first}
    both = [seed for seed in mine if seed in theirs]
    return {
        "variant": variant,
        "seeds": sorted(mine),
        "values": {
            name: interval([m[name] for m in mine.values()])
            for name in COLUMNS
            if mine and all(name in m for m in mine.values())
        },
        "differences": {
            name: interval([mine[seed][name] - theirs[seed][name] for seed in both])
            for name in COLUMNS
            if both and all(name in mine[s] and name in theirs[s] for s in both)
        }
        if variant != first
        else {},
    }


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and Student's interval of 95 %; one value alone has no interval."""
    mean = fmean(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    # Beyond the table the last entry is a little wide.
    quantile = QUANTILES[min(len(values) - 1, len(QUANTILES)) - 1]
    reach = quantile * stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - reach, "high": mean + reach}


def report_of(record: Mapping[str, Any]) -> str:
    """Markdown for people."""
    rows = [
        (
            each["variant"],
            str(len(each["seeds"])),
            *(_shown(each["values"].get(name), _digits(name)) for name in COLUMNS),
            _shown(each["differences"].get("valid/loss"), "+.4f"),
        )
        for each in record["summary"]
        if each["seeds"]
    ]
    first = record["summary"][0]["variant"]
    head = ("variant", "seeds", *COLUMNS.values(), f"loss against {first}, same seed")
    return "\n".join(
        [
            f"# {record['name']}\n",
            f"{len(record['trials'])} of {record['runs']} runs, rows of "
            f"{record['context_length']:,} tokens, on {record['device']}. Means over seeds with "
            "Student's intervals of 95 % where there are several.\n",
            *markdown_table(head, rows),
            "",
        ]
    )


def draw(record: Mapping[str, Any]) -> dict[str, Figure]:
    """Figures by name; none before a run is finished."""
    if not record["trials"]:
        return {}
    names = [each["variant"] for each in record["summary"] if each["seeds"]]
    by_variant = {
        name: [trial for trial in record["trials"] if trial["variant"] == name] for name in names
    }
    title = f"{record['name']}, {record['context_length']:,} tokens of context"
    drawn = {
        "loss.png": figures.compared_losses(
            {
                name: {t["seed"]: [(x, y) for x, y in t["train"]] for t in trials}
                for name, trials in by_variant.items()
            },
            title=title,
        )
    }
    ends = sorted(
        int(name.removeprefix(POSITIONS))
        for name in record["trials"][0]["metrics"]
        if name.startswith(POSITIONS)
    )
    if ends:
        drawn["loss_by_position.png"] = figures.compared_positions(
            [0, *ends],
            {
                name: {
                    t["seed"]: [t["metrics"].get(f"{POSITIONS}{e}", float("nan")) for e in ends]
                    for t in trials
                }
                for name, trials in by_variant.items()
            },
            title=title,
        )
    return drawn


def write_record(record: Mapping[str, Any], run: PretrainRun, folder: str) -> None:
    """Into the sweep's folder and into the MLflow run below which its runs stand.

    Args:
        run: any of the sweep's.

    Raises:
        OSError: the folder cannot be written.
    """
    report, drawn = report_of(record), draw(record)
    storage.write_text(storage.join(folder, RESULTS), json.dumps(record, indent=1))
    storage.write_text(storage.join(folder, REPORT), report)
    for name, figure in drawn.items():
        storage.write_bytes(storage.join(folder, name), figures.png(figure))
    queue = private_folder(run).with_name(f"{record['name']}-tracking-queue")
    tracker = Tracker(open_parent(run.tracking, queue_dir=queue))
    tracker.log_dict(dict(record), RESULTS)
    tracker.log_text(report, REPORT)
    for name, figure in drawn.items():
        tracker.log_figure(figure, f"figures/{name}")
    is_done = len(record["trials"]) == record["runs"]
    tracker.finish("FINISHED" if is_done else "RUNNING")


def _shown(value: Mapping[str, float | None] | None, digits: str) -> str:
    if value is None:
        return "-"
    mean, low, high = value["mean"], value["low"], value["high"]
    if low is None or high is None:
        return f"{mean:{digits}}"
    return f"{mean:{digits}} ± {(high - low) / 2:{digits.lstrip('+')}}"


def _digits(column: str) -> str:
    if column == "train/tokens_per_s":
        return ",.0f"
    return ".1f" if column.startswith("memory") else ".4f"
