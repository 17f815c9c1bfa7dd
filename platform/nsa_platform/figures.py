"""Figures of a run, drawn without a display: losses, gates, selection, needles, expert load.

Every function takes plain numbers and returns a matplotlib Figure; nothing here keeps state.
"""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

Points = Sequence[tuple[float, float]]
"""(x, y) in the order of x."""
Health = Sequence[tuple[int, Mapping[int, Mapping[str, float]]]]
"""(step, layer -> name -> value) in the order of steps."""

BRANCH_NAMES = {"cmp": "compressed", "slc": "selected", "win": "sliding", "full": "full attention"}

_INK, _FAINT = "#1f2933", "#9aa5b1"
_TRAIN, _VALID = "#7aa6d8", "#d1495b"
_SEQUENTIAL = "viridis"


def loss_curve(
    train: Points,
    valid: Points = (),
    *,
    unit: str = "nats per token",
    baselines: Mapping[str, float] | None = None,
    title: str = "Loss",
) -> Figure:
    """Training and validation loss against tokens seen, with a line for each baseline.

    Args:
        train, valid: (tokens seen, loss) pairs; a smoothed line is added to a long `train`.
        baselines: losses in the same unit that need no training to compare with, by name.
    """
    figure, axes = _canvas(title, x="tokens seen", y=f"loss ({unit})")
    if train:
        xs, ys = zip(*train, strict=True)
        smooth = _smoothed(ys) if len(ys) > 40 else None
        alpha = 0.35 if smooth else 1.0
        axes.plot(xs, ys, color=_TRAIN, alpha=alpha, linewidth=1.2, label="training")
        if smooth:
            axes.plot(xs, smooth, color="#2f6db3", linewidth=2, label="training, smoothed")
    if valid:
        xs, ys = zip(*valid, strict=True)
        axes.plot(xs, ys, color=_VALID, marker="o", markersize=4, linewidth=1.6, label="held-out")
        _note(axes, xs[-1], ys[-1], f"{ys[-1]:.2f}")
    _draw_baselines(axes, baselines or {})
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if train or valid:
        axes.legend(edgecolor="white", framealpha=0.9)
    return figure


def gate_means(history: Health, *, title: str = "Mean gate of each branch") -> Figure:
    """One panel for each branch: the mean gate of every layer over steps."""
    branches = [name for name in BRANCH_NAMES if any(name in row for row in _rows(history))]
    panels = len(branches) or 1
    figure = Figure(figsize=(3.6 * panels + 1.2, 3.8), layout="constrained")
    figure.suptitle(title, color=_INK)
    grid = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    layers, color = _layer_colors(history)
    for axes, branch in zip(grid, branches, strict=False):
        _dress(axes, BRANCH_NAMES[branch], x="step", y="")
        for layer in layers:
            line = _line(history, layer, branch)
            axes.plot(*line, color=_rgba(color, layer), linewidth=1.6, marker=_marker(line[0]))
        axes.set_ylim(0, 1)
    grid[0].set_ylabel("gate (0 closed, 1 open)")
    _layer_bar(figure, color, layers, grid)
    return figure


def selection_entropy(history: Health, *, title: str = "How widely attention spreads") -> Figure:
    """Entropy of the scores that select blocks, of every layer over steps.

    The values are named `entropy` in `history`, as a share of the largest possible.
    """
    figure, axes = _canvas(title, x="step", y="entropy (0 one block, 1 all alike)")
    layers, color = _layer_colors(history)
    for layer in layers:
        line = _line(history, layer, "entropy")
        axes.plot(*line, color=_rgba(color, layer), linewidth=1.6, marker=_marker(line[0]))
    axes.set_ylim(0, 1)
    _layer_bar(figure, color, layers, [axes])
    return figure


def selected_distance(
    shares: Mapping[int, Sequence[float]],
    *,
    block_size: int,
    title: str = "How far back the selected blocks lie",
) -> Figure:
    """Share of the selected blocks by distance from the query's block, for every layer.

    Args:
        shares: layer -> share by bucket; bucket 0 is the query's own block, bucket k holds
            distances of [2^(k-1), 2^k) blocks. Buckets that are empty in all layers are left out.
        block_size: tokens of a selection block (l'), for the label.
    """
    layers = sorted(shares)
    used = [k for layer in layers for k, share in enumerate(shares[layer]) if share > 0]
    buckets = range(max(used, default=0) + 1)
    values = [[shares[layer][k] for k in buckets] for layer in layers]
    labels = [_bucket_label(k) for k in buckets]
    where = f"distance from the query's own block, in blocks of {block_size} tokens"
    figure, axes = _canvas(title, x=where, y="layer")
    _heat(figure, axes, values, label="share of selected blocks", percent=True, low=0)
    axes.set_xticks(list(buckets), labels, rotation=30 if len(labels) > 8 else 0)
    _name_rows(axes, layers)
    return figure


def expert_load(
    loads: Mapping[int, Sequence[float]], *, title: str = "How many tokens come to each expert"
) -> Figure:
    """Load of every expert of every layer, over the layer's mean.

    Args:
        loads: layer -> load by expert, 1 where it is even.
    """
    layers = sorted(loads)
    figure, axes = _canvas(title, x="expert", y="layer")
    values = [loads[layer] for layer in layers]
    _heat(figure, axes, values, label="load over the mean", low=0, high=2, map_="RdBu_r")
    _name_rows(axes, layers)
    return figure


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
    figure, axes = _canvas(title, x="context length (tokens)", y="depth of the needle")
    figure.set_size_inches(max(6.5, 1.0 * len(lengths) + 2.5), max(3.8, 0.5 * len(depths) + 1.8))
    # At least 1, so that noise about 0 keeps the colour of 0.
    reach = max([1.0, *(abs(value) for row in values for value in row)])
    low, high = (0.0, 1.0) if percent else (-reach, reach)
    _heat(figure, axes, values, label=label, percent=percent, low=low, high=high, map_="RdYlGn")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    return figure


def loss_by_position(
    edges: Sequence[int],
    values: Sequence[float | None],
    *,
    unit: str,
    baselines: Mapping[str, float] | None = None,
    title: str = "Loss by position in the context",
) -> Figure:
    """A step for each part of the context; a falling stair means that context is used.

    Args:
        edges: positions where the parts begin, and the end of the last; one more than `values`.
        values: loss in `unit`; None where no token was counted.
        baselines: as in `loss_curve`.
    """
    figure, axes = _canvas(title, x="position in the context (tokens)", y=f"loss ({unit})")
    heights = [float("nan") if value is None else value for value in values]
    axes.stairs(heights, edges, baseline=None, color=_VALID, linewidth=2.2)
    for left, right, height in zip(edges[:-1], edges[1:], heights, strict=True):
        if height == height:
            _note(axes, (left + right) / 2, height, f"{height:.2f}", above=True)
    _draw_baselines(axes, baselines or {})
    axes.set_xticks(list(edges), [f"{edge:,}" for edge in edges], rotation=30, ha="right")
    axes.margins(y=0.15)
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
    figure, axes = _canvas(title, x=unit, y="")
    figure.set_size_inches(7.0, 1.4 + 0.5 * len(names))
    colors = [_VALID] + [_FAINT] * (len(names) - 1) if intervals is None else _TRAIN
    reach = None
    if intervals is not None:
        pairs = zip(values, intervals, strict=True)
        reach = np.array([(mean - low, high - mean) for mean, (low, high) in pairs]).T.clip(0)
    drawn = axes.barh(
        range(len(names)), list(values), color=colors, height=0.6, xerr=reach, ecolor=_INK
    )
    axes.bar_label(drawn, fmt="%.3f", padding=4, color=_INK)
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
    figure, axes = _canvas(title, x="context length (tokens)", y="")
    figure.set_size_inches(max(6.5, len(columns) + 3.5), max(2.4, 0.5 * len(names) + 1.4))
    numbers = [[float("nan") if value is None else value for value in row] for row in values]
    _heat(figure, axes, numbers, label="score", percent=True, low=0.0, high=1.0, map_="RdYlGn")
    axes.set_xticks(range(len(columns)), list(columns))
    axes.set_yticks(range(len(names)), list(names))
    return figure


def scaling(
    points: Mapping[str, tuple[float, float]],
    steps: Mapping[str, Sequence[tuple[float, int]]],
    *,
    title: str,
) -> Figure:
    """What autoscaling policies cost and miss, and how many replicas some of them kept.

    Args:
        points: (replica-seconds, late or refused requests) by policy; the first is the one to look
            at.
        steps: (seconds, replicas from then on) by policy.
    """
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    figure.suptitle(title, color=_INK)
    left, right = figure.subplots(1, 2)
    _dress(left, "Late first tokens against cost", x="replica-seconds", y="late or refused")
    for place, (name, (cost, missed)) in enumerate(points.items()):
        left.scatter([cost], [missed], color=_FAINT if place else _VALID, s=60, zorder=3)
        left.annotate(name, (cost, missed), xytext=(7, 5), textcoords="offset points", color=_INK)
    left.set_ylim(bottom=0)
    left.margins(x=0.2)
    _dress(right, "Replicas over time", x="seconds", y="")
    for place, (name, line) in enumerate(steps.items()):
        times, counts = zip(*line, strict=True)
        color = _FAINT if place else _VALID
        right.step(times, counts, where="post", color=color, label=name, linewidth=1.8)
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    return figure


def _canvas(title: str, *, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axes = figure.subplots()
    _dress(axes, title, x=x, y=y)
    return figure, axes


def _dress(axes: Axes, title: str, *, x: str, y: str) -> None:
    axes.set_title(title, color=_INK)
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if x == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _heat(
    figure: Figure,
    axes: Axes,
    values: Sequence[Sequence[float]],
    *,
    label: str,
    percent: bool = False,
    low: float | None = None,
    high: float | None = None,
    map_: str = _SEQUENTIAL,
) -> None:
    """A heat map with a labelled scale; few enough cells also carry their numbers."""
    axes.grid(False)
    image = axes.imshow(list(values), aspect="auto", vmin=low, vmax=high, cmap=map_)
    above = high is not None and max((max(row) for row in values), default=high) > high
    bar = figure.colorbar(image, ax=axes, label=label, extend="max" if above else "neither")
    if percent:
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    bar.outline.set_visible(False)
    if sum(len(row) for row in values) > 200:
        return
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value != value:
                continue
            red, green, blue, _ = _rgba(image, value)
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            text = f"{value:.0%}" if percent else f"{value:.2f}"
            axes.text(
                j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else _INK
            )


def _layer_colors(history: Health) -> tuple[list[int], ScalarMappable]:
    layers = sorted({layer for _, by_layer in history for layer in by_layer})
    first, last = (layers[0], layers[-1]) if layers else (0, 0)
    # The map without its palest end, which is hard to see as a line.
    shades = [matplotlib.colormaps[_SEQUENTIAL](0.88 * i / 255) for i in range(256)]
    return layers, ScalarMappable(Normalize(first, max(last, first + 1)), ListedColormap(shades))


def _layer_bar(
    figure: Figure, color: ScalarMappable, layers: Sequence[int], grid: Sequence[Axes]
) -> None:
    """Name the layers: a legend for a few, a scale for many."""
    if len(layers) <= 8:
        names = [f"layer {layer}" for layer in layers]
        figure.legend(grid[-1].get_lines(), names, loc="outside right upper", frameon=False)
    else:
        figure.colorbar(color, ax=list(grid), label="layer")


def _rgba(color: ScalarMappable, value: float) -> tuple[float, float, float, float]:
    red, green, blue, alpha = color.to_rgba(np.array([value]))[0]
    return float(red), float(green), float(blue), float(alpha)


def _name_rows(axes: Axes, layers: Sequence[int]) -> None:
    """Layer numbers beside the rows of a heat map, every second or third where they crowd."""
    step = 1 + len(layers) // 16
    shown = range(0, len(layers), step)
    axes.set_yticks(list(shown), [str(layers[i]) for i in shown])


def _rows(history: Health) -> list[Mapping[str, float]]:
    return [row for _, by_layer in history for row in by_layer.values()]


def _line(history: Health, layer: int, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one layer, where it has them."""
    found = [
        (step, by_layer[layer][name])
        for step, by_layer in history
        if name in by_layer.get(layer, {})
    ]
    return [step for step, _ in found], [value for _, value in found]


def _marker(steps: Sequence[int]) -> str:
    """Points are drawn while there are few enough to be told apart."""
    return "o" if len(steps) <= 12 else ""


def _smoothed(values: Sequence[float]) -> list[float]:
    """Mean over the neighbours on both sides, about a twentieth of the curve; no lag."""
    reach = max(2, len(values) // 40)
    near = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in near]


def _bucket_label(bucket: int) -> str:
    """Distances of a logarithmic bucket, in blocks."""
    if bucket == 0:
        return "own"
    first, last = 2 ** (bucket - 1), 2**bucket - 1
    return str(first) if first == last else f"{first:,}-{last:,}"


def _draw_baselines(axes: Axes, baselines: Mapping[str, float]) -> None:
    """A line across the axes for each baseline, named where it ends."""
    for name, value in baselines.items():
        axes.axhline(value, color=_INK, linestyle="--", linewidth=1)
        text = f"{name} {value:.2f}"
        across = axes.get_yaxis_transform()
        axes.text(0.99, value, text, transform=across, ha="right", va="bottom", color=_INK)


def _note(axes: Axes, x: float, y: float, text: str, *, above: bool = False) -> None:
    offset, align = ((0, 6), "center") if above else ((6, 0), "left")
    axes.annotate(
        text, (x, y), xytext=offset, textcoords="offset points", ha=align, va="bottom", color=_INK
    )
