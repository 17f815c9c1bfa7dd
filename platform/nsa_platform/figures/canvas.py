"""What all figures share: colours, axes, heat maps, notes."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

INK, FAINT = "#1f2933", "#9aa5b1"
TRAIN, VALID = "#7aa6d8", "#d1495b"
SEQUENTIAL = "viridis"


def canvas(title: str, *, x: str, y: str) -> tuple[Figure, Axes]:
    """One dressed pair of axes on a figure."""
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axes = figure.subplots()
    dress(axes, title, x=x, y=y)
    return figure, axes


def dress(axes: Axes, title: str, *, x: str, y: str) -> None:
    """Title, labels and a faint grid; x="step" is counted in whole numbers."""
    axes.set_title(title, color=INK)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if x == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def heat(
    figure: Figure,
    axes: Axes,
    values: Sequence[Sequence[float]],
    *,
    label: str,
    percent: bool = False,
    low: float | None = None,
    high: float | None = None,
    map_: str = SEQUENTIAL,
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
            red, green, blue, _ = rgba(image, value)
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            text = f"{value:.0%}" if percent else f"{value:.2f}"
            axes.text(
                j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else INK
            )


def rgba(color: ScalarMappable, value: float) -> tuple[float, float, float, float]:
    """The colour of a value."""
    red, green, blue, alpha = color.to_rgba(np.array([value]))[0]
    return float(red), float(green), float(blue), float(alpha)


def draw_baselines(axes: Axes, baselines: Mapping[str, float]) -> None:
    """A line across the axes for each baseline, named where it ends."""
    for name, value in baselines.items():
        axes.axhline(value, color=INK, linestyle="--", linewidth=1)
        text = f"{name} {value:.2f}"
        across = axes.get_yaxis_transform()
        axes.text(0.99, value, text, transform=across, ha="right", va="bottom", color=INK)


def png(figure: Figure) -> bytes:
    """The figure as an image file."""
    image = io.BytesIO()
    figure.savefig(image, dpi=110, format="png")
    return image.getvalue()


def note(axes: Axes, x: float, y: float, text: str, *, above: bool = False) -> None:
    """A few words beside a point, or above it."""
    offset, align = ((0, 6), "center") if above else ((6, 0), "left")
    axes.annotate(
        text, (x, y), xytext=offset, textcoords="offset points", ha=align, va="bottom", color=INK
    )
