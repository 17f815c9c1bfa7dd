"""Results of an evaluation into an MLflow run: metrics, tables, figures, one JSON."""

from dataclasses import asdict
from typing import Any

from nsa_platform import figures
from nsa_platform.evaluate.bits_per_byte import BitsPerByte
from nsa_platform.evaluate.needle import NeedleGrid
from nsa_platform.tracking import Tracker

MODEL = "model"
"""Name of the model among the scorers of `bits_per_byte`; the others are baselines."""
UNIT = "bits per byte"


def record_bits_per_byte(tracker: Tracker, results: dict[str, BitsPerByte], step: int) -> None:
    """eval/bits_per_byte and eval/bits_per_byte_<baseline>, a table by position, two figures."""
    totals = {name: result.total.bits_per_byte for name, result in results.items()}
    known = {name: value for name, value in totals.items() if value is not None}
    model = results[MODEL]
    metrics = {
        "eval/bits_per_byte" + ("" if name == MODEL else f"_{name}"): value
        for name, value in known.items()
    }
    tracker.log_metrics({**metrics, "eval/loss": model.total.nats_per_token or 0.0}, step)
    columns = ["from position", "to position", "tokens", "bytes", *(f"{n} ({UNIT})" for n in known)]
    rows = [
        [first, last, part.tokens, part.bytes, *(results[n].parts[i].bits_per_byte for n in known)]
        for i, (first, last, part) in enumerate(
            zip(model.edges[:-1], model.edges[1:], model.parts, strict=True)
        )
    ]
    tracker.log_table(columns, rows, "evaluation/bits_per_byte_by_position.json")
    tracker.log_figure(
        figures.loss_by_position(
            model.edges,
            [part.bits_per_byte for part in model.parts],
            unit=UNIT,
            baselines={name: value for name, value in known.items() if name != MODEL},
        ),
        "evaluation/bits_per_byte_by_position.png",
    )
    tracker.log_figure(
        figures.bars(
            list(known),
            list(known.values()),
            unit=f"{UNIT} (lower is better)",
            title=f"Held-out text: {model.total.tokens:,} tokens, {model.total.bytes:,} bytes",
        ),
        "evaluation/bits_per_byte.png",
    )


def record_needles(tracker: Tracker, grid: NeedleGrid, step: int) -> None:
    """eval/needle_exact, _tokens and _lift, a table of all trials, a heat map for each."""
    readings = ("exact", "tokens", "lift")
    tracker.log_metrics({f"eval/needle_{name}": grid.mean(name) for name in readings}, step)
    rows = [list(asdict(trial).values()) for trial in grid.trials]
    tracker.log_table(list(asdict(grid.trials[0])), rows, "evaluation/needle_trials.json")
    per_cell = len(grid.trials) // (len(grid.lengths) * len(grid.depths))
    labels = {
        "exact": ("share of numbers", "numbers written exactly"),
        "tokens": ("share of the number's tokens", "tokens predicted, the earlier ones given"),
        "lift": ("nats", "what the needle adds to log p(number)"),
    }
    for name, (label, about) in labels.items():
        figure = figures.needle_map(
            grid.lengths,
            grid.depths,
            grid.cells(name),
            label=label,
            title=f"Needle in a haystack: {about}\nneedles in each cell: {per_cell}",
            percent=name != "lift",
        )
        tracker.log_figure(figure, f"evaluation/needle_{name}.png")


def summary(bits: dict[str, BitsPerByte] | None, grid: NeedleGrid | None) -> dict[str, Any]:
    """All results as plain values."""
    result: dict[str, Any] = {}
    if bits is not None:
        result["bits_per_byte"] = {
            name: {
                "bits_per_byte": each.total.bits_per_byte,
                "nats_per_token": each.total.nats_per_token,
                "tokens": each.total.tokens,
                "bytes": each.total.bytes,
                "edges": list(each.edges),
                "by_position": [part.bits_per_byte for part in each.parts],
            }
            for name, each in bits.items()
        }
    if grid is not None:
        means = {name: grid.mean(name) for name in ("exact", "tokens", "lift")}
        result["needle"] = {**means, "trials": [asdict(trial) for trial in grid.trials]}
    return result
