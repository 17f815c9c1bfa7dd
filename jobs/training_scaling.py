"""How a training benchmark scales: the rate of each of several workers beside that of one alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_platform import figures

Record = dict[str, Any]

HEAD = ("context", "attention", "recomputed", "workers", "shared", "tokens/s/GPU", "of one alone")
SAME = ("model", "layers", "device", "dtype", "compile", "commit")
"""What results have in common that are compared."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """A point of several workers."""

    attention: str
    context: int
    recompute: str
    workers: int
    shared: str
    """What they share beside the state: axes of the mesh with their degrees."""
    rate: float
    """Tokens per second of each worker."""
    efficiency: float
    """The rate over that of one worker that computes the same."""


def scaled(results: Sequence[Record]) -> list[Scaled]:
    """Every point of several workers for which there is one of a single worker: same model and
    device, same attention and context, same activations computed again."""
    alone = {
        _sameness(result, record): record["value"]
        for result in results
        for record in result["records"]
        if result["workers"] == 1 and "value" in record
    }
    found = [
        Scaled(
            record["attention"],
            record["context"],
            record["recompute"],
            result["workers"],
            _shared(result["mesh"]),
            record["value"],
            record["value"] / alone[same],
        )
        for result in results
        for record in result["records"]
        if result["workers"] > 1
        and "value" in record
        and (same := _sameness(result, record)) in alone
    ]
    return sorted(found, key=lambda each: (each.attention, each.context, each.workers, each.shared))


def section(points: Sequence[Scaled], labels: dict[str, str], *, picture: str) -> list[str]:
    """A section of the page; labels: attention -> its name."""
    rows = [
        (
            f"{each.context:,}",
            labels[each.attention],
            each.recompute,
            str(each.workers),
            each.shared,
            f"{each.rate:,.0f}",
            f"{each.efficiency:.1%}",
        )
        for each in points
    ]
    return [
        "",
        "## Scaling",
        "",
        "Tokens per second of each worker as a share of what one worker alone has at the same",
        "context, with the same activations computed again.",
        "",
        f"![Rate of each worker against their number]({picture})",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---" * len(HEAD) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def draw(points: Sequence[Scaled], labels: dict[str, str], path: Path) -> None:
    """Efficiency against the number of workers."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for each in points:
        name = f"{labels[each.attention]}, {each.context:,} tokens, {each.shared}"
        lines.setdefault(name, [(1, 1.0)]).append((each.workers, each.efficiency))
    figures.efficiency(lines).savefig(path, dpi=110)


def _sameness(result: Record, record: Record) -> tuple[Any, ...]:
    where = record["attention"], record["context"], record["recompute"]
    return (*(result[name] for name in SAME), *where)


def _shared(mesh: str) -> str:
    """Axes of a mesh but that of the state: `context 2, state over 4` is `context 2`."""
    axes = [axis for axis in mesh.split(", ") if not axis.startswith("state over")]
    return ", ".join(axes) or "state alone"
