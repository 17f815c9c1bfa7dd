"""What selection finds, in pictures: attention held by blocks, attention by block, their worth"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from nsa_platform.figures.canvas import FAINT, INK, SEQUENTIAL, TRAIN, VALID, canvas, dress


def attention_held(layers: Mapping[int, tuple[float, float, float]], *, title: str) -> Figure:
    """Share of the true attention in three choices of blocks, for every layer.

    Args:
        layers: layer -> (chosen blocks, the best blocks, the forced blocks alone).
    """
    figure, axes = canvas(title, x="layer", y="share of the true attention")
    names = ("chosen", "best possible (Exact-Top)", "initial and local alone")
    places = np.arange(len(layers))
    for i, (name, color) in enumerate(zip(names, (TRAIN, VALID, FAINT), strict=True)):
        heights = [layers[layer][i] for layer in sorted(layers)]
        axes.bar(places + 0.27 * (i - 1), heights, 0.27, color=color, label=name)
    axes.set_xticks(places, [str(layer) for layer in sorted(layers)])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(0, 1.02)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def quality_by_blocks(lines: Mapping[str, Sequence[tuple[float, float]]], *, title: str) -> Figure:
    """Bits per byte against the blocks that a query reads.

    Args:
        lines: "fixed" and "adaptive" -> points of (blocks, bits per byte), in any order.
    """
    figure, axes = canvas(title, x="selected blocks read by a query, mean", y="bits per byte")
    styles = {"fixed": (FAINT, "o"), "adaptive": (TRAIN, "s")}
    for name, points in lines.items():
        color, marker = styles[name]
        xs, ys = zip(*sorted(points), strict=True) if points else ((), ())
        axes.plot(xs, ys, color=color, marker=marker, label=name)
    axes.legend()
    return figure


def block_attention(
    maps: Mapping[int, Sequence[Sequence[float]]], queries: Sequence[int], *, block: int, title: str
) -> Figure:
    """True attention by block, one panel for each layer, on a logarithmic scale.

    Args:
        maps: layer -> one row for each query, one column for each block.
        queries: the rows' positions, ascending.
        block: tokens of a block.
    """
    figure = Figure(figsize=(1.2 + 3.4 * len(maps), 4.0), layout="constrained")
    figure.suptitle(title, color=INK)
    panels = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    image = None
    for axes, layer in zip(panels, sorted(maps), strict=True):
        dress(axes, f"layer {layer}", x=f"block of {block} keys", y="")
        axes.grid(False)
        values = np.array(maps[layer], dtype=float).clip(1e-4)
        image = axes.imshow(
            values, aspect="auto", cmap=SEQUENTIAL, norm=LogNorm(1e-4, 1), interpolation="nearest"
        )
    rows = np.linspace(0, len(queries) - 1, min(5, len(queries))).round().astype(int)
    panels[0].set_yticks(rows, [f"{queries[row]:,}" for row in rows])
    panels[0].set_ylabel("position of the query", color=INK)
    if image is not None:
        figure.colorbar(image, ax=list(panels), label="share of the attention")
    return figure
