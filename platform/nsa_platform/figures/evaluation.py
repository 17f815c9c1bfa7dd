"""A measured model in pictures: needles and scores."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from nsa_platform.figures.canvas import FAINT, INK, TRAIN, VALID, canvas, dress, heat


def needle_map(
    lengths: Sequence[int],
    depths: Sequence[float],
    values: Sequence[Sequence[float]],
    *,
    label: str,
    title: str,
    percent: bool = True,
) -> Figure:
    """A needle's fate over context length and depth: green found, red lost.

    Args:
        values: one row for each depth, one column for each length.
        label: what a value is.
        percent: values are shares from 0 to 1; otherwise any numbers around 0.
    """
    figure, axes = canvas(title, x="context length (tokens)", y="depth of the needle")
    figure.set_size_inches(max(6.5, 1.0 * len(lengths) + 2.5), max(3.8, 0.5 * len(depths) + 1.8))
    # At least 1, so that noise about 0 keeps the colour of 0.
    reach = max([1.0, *(abs(value) for row in values for value in row)])
    low, high = (0.0, 1.0) if percent else (-reach, reach)
    heat(figure, axes, values, label=label, percent=percent, low=low, high=high, map_="RdYlGn")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:g}%" for depth in depths])
    return figure


def needle_maps(
    maps: Mapping[str, tuple[Sequence[int], Sequence[float], Sequence[Sequence[float]]]],
    *,
    title: str,
) -> Figure:
    """Maps of shares side by side, at most four in a row, on one scale.

    Args:
        maps: title -> lengths, depths, and one row for each depth, one column for each length.
    """
    columns = min(len(maps), 4)
    rows = -(-len(maps) // columns)
    wide = max(len(lengths) for lengths, _, _ in maps.values())
    tall = max(len(depths) for _, depths, _ in maps.values())
    size = columns * (0.8 * wide + 1.6), rows * (0.45 * tall + 1.5) + 0.5
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, color=INK)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(maps) :]:
        axes.set_axis_off()
    for axes, (name, (lengths, depths, values)) in zip(panels, maps.items(), strict=False):
        dress(axes, name, x="context length (tokens)", y="depth of the needle")
        heat(figure, axes, values, label="", percent=True, low=0.0, high=1.0, map_="RdYlGn")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=30)
        axes.set_yticks(range(len(depths)), [f"{100 * depth:g}%" for depth in depths])
    return figure


def bars(
    names: Sequence[str],
    values: Sequence[float],
    *,
    unit: str,
    title: str,
    intervals: Sequence[tuple[float, float]] | None = None,
) -> Figure:
    """Horizontal bars with their values; the first is the one to look at, unless they are scores.

    Args:
        intervals: (low, high) of each score; no bar is then drawn apart from the others.
    """
    figure, axes = canvas(title, x=unit, y="")
    figure.set_size_inches(7.0, 1.4 + 0.5 * len(names))
    colors = [VALID] + [FAINT] * (len(names) - 1) if intervals is None else TRAIN
    reach = None
    if intervals is not None:
        pairs = zip(values, intervals, strict=True)
        reach = np.array([(mean - low, high - mean) for mean, (low, high) in pairs]).T.clip(0)
    drawn = axes.barh(
        range(len(names)), list(values), color=colors, height=0.6, xerr=reach, ecolor=INK
    )
    axes.bar_label(drawn, fmt="%.3f", padding=4, color=INK)
    axes.set_yticks(range(len(names)), list(names))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    return figure


def scores(
    names: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    title: str,
) -> Figure:
    """Scores from 0 to 1: one row for each task, one column for each length; None: not measured."""
    figure, axes = canvas(title, x="context length (tokens)", y="")
    figure.set_size_inches(max(6.5, len(columns) + 3.5), max(2.4, 0.5 * len(names) + 1.4))
    numbers = [[float("nan") if value is None else value for value in row] for row in values]
    heat(figure, axes, numbers, label="score", percent=True, low=0.0, high=1.0, map_="RdYlGn")
    axes.set_xticks(range(len(columns)), list(columns))
    axes.set_yticks(range(len(names)), list(names))
    return figure
