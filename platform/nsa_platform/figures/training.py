"""A training run in pictures: losses, gates, selection, expert load."""

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from nsa_platform.figures.canvas import (
    FAINT,
    INK,
    SEQUENTIAL,
    TRAIN,
    VALID,
    canvas,
    draw_baselines,
    dress,
    heat,
    note,
    rgba,
)

Points = Sequence[tuple[float, float]]
"""(x, y) in the order of x."""
Health = Sequence[tuple[int, Mapping[int, Mapping[str, float]]]]
"""(step, layer -> name -> value) in the order of steps."""

BRANCH_NAMES = {"cmp": "compressed", "slc": "selected", "win": "sliding", "full": "full attention"}


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
    figure, axes = canvas(title, x="tokens seen", y=f"loss ({unit})")
    if train:
        xs, ys = zip(*train, strict=True)
        smooth = _smoothed(ys) if len(ys) > 40 else None
        alpha = 0.35 if smooth else 1.0
        axes.plot(xs, ys, color=TRAIN, alpha=alpha, linewidth=1.2, label="training")
        if smooth:
            axes.plot(xs, smooth, color="#2f6db3", linewidth=2, label="training, smoothed")
    if valid:
        xs, ys = zip(*valid, strict=True)
        axes.plot(xs, ys, color=VALID, marker="o", markersize=4, linewidth=1.6, label="held-out")
        note(axes, xs[-1], ys[-1], f"{ys[-1]:.2f}")
    draw_baselines(axes, baselines or {})
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if train or valid:
        axes.legend(edgecolor="white", framealpha=0.9)
    return figure


def gate_means(
    history: Health,
    *,
    title: str = "Mean gate of each branch",
    begins: Mapping[str, int] | None = None,
) -> Figure:
    """One panel for each branch: the mean gate of every layer over steps.

    begins: name of a run -> the step at which it begins, where a line stands.
    """
    branches = [name for name in BRANCH_NAMES if any(name in row for row in _rows(history))]
    panels = len(branches) or 1
    figure = Figure(figsize=(3.6 * panels + 1.2, 3.8), layout="constrained")
    figure.suptitle(title, color=INK)
    grid = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    layers, color = _layer_colors(history)
    for axes, branch in zip(grid, branches, strict=False):
        dress(axes, BRANCH_NAMES[branch], x="step", y="")
        for layer in layers:
            line = _line(history, layer, branch)
            axes.plot(*line, color=rgba(color, layer), linewidth=1.6, marker=_marker(line[0]))
        axes.set_ylim(0, 1)
    grid[0].set_ylabel("gate (0 closed, 1 open)")
    _layer_bar(figure, color, layers, grid)
    # After the legend, which has an entry for every line.
    for name, step in (begins or {}).items():
        for axes in grid:
            axes.axvline(step, color=FAINT, linestyle=":")
            axes.text(step, 0.02, f" {name}", color=INK, fontsize=8)
    return figure


def selection_entropy(history: Health, *, title: str = "How widely attention spreads") -> Figure:
    """Entropy of the scores that select blocks, of every layer over steps.

    The values are named `entropy` in `history`, as a share of the largest possible.
    """
    figure, axes = canvas(title, x="step", y="entropy (0 one block, 1 all alike)")
    layers, color = _layer_colors(history)
    for layer in layers:
        line = _line(history, layer, "entropy")
        axes.plot(*line, color=rgba(color, layer), linewidth=1.6, marker=_marker(line[0]))
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
    figure, axes = canvas(title, x=where, y="layer")
    heat(figure, axes, values, label="share of selected blocks", percent=True, low=0)
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
    figure, axes = canvas(title, x="expert", y="layer")
    values = [loads[layer] for layer in layers]
    heat(figure, axes, values, label="load over the mean", low=0, high=2, map_="RdBu_r")
    _name_rows(axes, layers)
    return figure


def loss_by_position(
    edges: Sequence[int],
    values: Sequence[float | None],
    *,
    unit: str,
    baselines: Mapping[str, float] | None = None,
    title: str = "Loss by position in the context",
) -> Figure:
    """An equal step for each part of the context; a falling stair means that context is used.

    Args:
        edges: positions where the parts begin, and the end of the last; one more than `values`.
        values: loss in `unit`; None where no token was counted.
        baselines: as in `loss_curve`.
    """
    figure, axes = canvas(title, x="position in the context (tokens)", y=f"loss ({unit})")
    heights = [float("nan") if value is None else value for value in values]
    axes.stairs(heights, range(len(edges)), baseline=None, color=VALID, linewidth=2.2)
    for left, height in enumerate(heights):
        if height == height:
            note(axes, left + 0.5, height, f"{height:.2f}", above=True)
    draw_baselines(axes, baselines or {})
    axes.set_xticks(range(len(edges)), [f"{edge:,}" for edge in edges], rotation=30, ha="right")
    axes.margins(y=0.15)
    return figure


def throughput(
    lines: Mapping[str, Points], *, title: str = "Training throughput by context"
) -> Figure:
    """Tokens per second and GPU against the context, both on doubling scales.

    Args:
        lines: name -> points (tokens of context, tokens per second and GPU).
    """
    figure, axes = canvas(title, x="context (tokens)", y="tokens per second and GPU")
    for name, points in lines.items():
        contexts, rates = zip(*sorted(points), strict=True)
        axes.plot(contexts, rates, marker="o", linewidth=2, label=name)
        for context, rate in zip(contexts, rates, strict=True):
            note(axes, context, rate, f"{rate:,.0f}", above=True)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    ticks = sorted({context for points in lines.values() for context, _ in points})
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.margins(0.1)
    if lines:
        axes.legend(frameon=False)
    return figure


def efficiency(
    lines: Mapping[str, Points], *, title: str = "Training throughput by workers"
) -> Figure:
    """Rate of each worker over that of one alone; 100 % is as good as it gets.

    Args:
        lines: name -> points (workers, share).
    """
    figure, axes = canvas(title, x="workers", y="tokens per second and worker, of one alone")
    for name, points in lines.items():
        workers, shares = zip(*sorted(points), strict=True)
        axes.plot(workers, shares, marker="o", linewidth=2, label=name)
        note(axes, workers[-1], shares[-1], f"{shares[-1]:.0%}")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({count for points in lines.values() for count, _ in points}))
    figure.legend(loc="outside lower center", fontsize="small")
    return figure


def _layer_colors(history: Health) -> tuple[list[int], ScalarMappable]:
    layers = sorted({layer for _, by_layer in history for layer in by_layer})
    first, last = (layers[0], layers[-1]) if layers else (0, 0)
    # The map without its palest end, which is hard to see as a line.
    shades = [matplotlib.colormaps[SEQUENTIAL](0.88 * i / 255) for i in range(256)]
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
