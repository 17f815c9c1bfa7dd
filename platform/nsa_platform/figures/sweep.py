"""Variants of a training run side by side, with the spread of their seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from nsa_platform.figures.canvas import INK, dress

Points = Sequence[tuple[float, float]]
"""(tokens seen, loss) in the order of tokens."""

# A share of the curve's beginning that is not drawn: the fall from random weights hides the rest.
SKIPPED = 0.1
PARTS = 20
"""Of a curve, each of which is one point of its difference to another."""


def compared_losses(
    curves: Mapping[str, Mapping[int, Points]], *, title: str, unit: str = "nats per token"
) -> Figure:
    """Training loss of each variant, and its difference to the first with the same seed.

    Args:
        curves: variant -> seed -> curve.
    """
    figure, (left, right) = _panels(title)
    dress(left, "training loss, smoothed", x="tokens seen", y=f"loss ({unit})")
    first, *others = curves
    dress(right, f"difference to {first}, same seed", x="tokens seen", y=f"loss ({unit})")
    parts = {
        name: {seed: _in_parts(curve) for seed, curve in runs.items()}
        for name, runs in curves.items()
    }
    for name, line in zip(curves, _lines(len(curves)), strict=True):
        mine, theirs = parts[name], parts[first]
        xs = next(iter(mine.values()))[0]
        _band(left, xs, [ys for _, ys in mine.values()], line=line, label=name)
        if name in others:
            pairs = [(mine[seed][1], theirs[seed][1]) for seed in mine if seed in theirs]
            _band(right, xs, [a - b for a, b in pairs if len(a) == len(b)], line=line)
    right.axhline(0, color=INK, linewidth=1)
    for axes in (left, right):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def compared_positions(
    edges: Sequence[int],
    losses: Mapping[str, Mapping[int, Sequence[float]]],
    *,
    title: str,
    unit: str = "nats per token",
) -> Figure:
    """Held-out loss of each variant by position, and its difference to the first.

    Args:
        edges: where the parts of the context begin, and the end of the last.
        losses: variant -> seed -> the loss in each part; nan where there is none.
    """
    figure, (left, right) = _panels(title)
    dress(left, "held-out loss", x="position in the context (tokens)", y=f"loss ({unit})")
    first, *others = losses
    dress(right, f"difference to {first}, same seed", x=left.get_xlabel(), y=left.get_ylabel())
    xs = np.arange(len(edges) - 1) + 0.5
    for name, line in zip(losses, _lines(len(losses)), strict=True):
        mine, theirs = losses[name], losses[first]
        _band(left, xs, [np.array(values) for values in mine.values()], line=line, label=name)
        if name in others:
            both = [seed for seed in mine if seed in theirs]
            apart = [np.array(mine[seed]) - np.array(theirs[seed]) for seed in both]
            _band(right, xs, apart, line=line)
    right.axhline(0, color=INK, linewidth=1)
    for axes in (left, right):
        axes.set_xticks(range(len(edges)), [f"{edge:,}" for edge in edges], rotation=30, ha="right")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _panels(title: str) -> tuple[Figure, tuple[Axes, Axes]]:
    figure = Figure(figsize=(12.5, 5.2), layout="constrained")
    figure.suptitle(title, color=INK)
    left, right = figure.subplots(1, 2)
    return figure, (left, right)


def _lines(count: int) -> list[dict[str, Any]]:
    """What tells the variants apart: ten colours, then the same dashed, and so on."""
    shades, dashes = matplotlib.colormaps["tab10"], ("-", "--", ":")
    return [
        {"color": shades(i % shades.N)[:3], "linestyle": dashes[i // shades.N % len(dashes)]}
        for i in range(count)
    ]


def _in_parts(curve: Points) -> tuple[NDArray[Any], NDArray[Any]]:
    """Means of tokens and loss over equal parts of the curve, without its beginning."""
    points = np.array(curve, dtype=np.float64)[int(SKIPPED * len(curve)) :]
    parts = np.array_split(points, min(PARTS, len(points)))
    means = np.array([part.mean(0) for part in parts])
    return means[:, 0], means[:, 1]


def _band(
    axes: Axes,
    xs: NDArray[Any],
    runs: Sequence[NDArray[Any]],
    *,
    line: Mapping[str, Any],
    label: str | None = None,
) -> None:
    """The mean as a line, lowest to highest as a band."""
    if not runs:
        return
    stack = np.array(runs)
    axes.plot(xs, stack.mean(0), linewidth=1.8, label=label, **line)
    if len(runs) > 1:
        low, high = stack.min(0), stack.max(0)
        axes.fill_between(xs, low, high, color=line["color"], alpha=0.2, linewidth=0)
