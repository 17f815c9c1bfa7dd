"""The benchmark's pictures: time against context, decode latency against context, occupancy."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.fullness import passes_of
from benchmarks.report import Times

Record = dict[str, Any]

_INK, _FAINT = "#1f2933", "#9aa5b1"
# Ours in strong colours, dense attention in greys and browns; name, colour, line.
CONTEXT_LINES = {
    "nsa_real": ("NSA, blocks as in a trained model", "#c2255c", "-"),
    "nsa": ("NSA, blocks at random", "#e8590c", "-"),
    "full": ("dense, ours (Triton)", "#4c6ef5", "--"),
    "sdpa_cudnn": ("dense, cuDNN", "#343a40", "--"),
    "sdpa_flash": ("dense, torch flash", "#868e96", "--"),
    "flash_attn_4": ("dense, FlashAttention-4", "#2b8a3e", "--"),
}
DECODE_LINES = {
    "nsa_paged": ("NSA, paged", "#c2255c", "-"),
    "full_paged": ("dense, ours, paged", "#4c6ef5", "--"),
    "torch_sdpa": ("dense, torch", "#343a40", "--"),
}


def draw_context(records: list[Record], path: Path) -> None:
    """Milliseconds of one layer's attention against the context, forward and backward."""
    times = Times(records)
    figure = Figure(figsize=(11, 4.8), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, direction in zip(panels, ("forward", "backward"), strict=True):
        lines = {}
        for op, style in CONTEXT_LINES.items():
            found = [times.get(workload, op, direction) for workload in times.same_shape()]
            points = [(record["tokens"], record["value"]) for record in found if record]
            if points:
                lines[style] = points
        _plot(axes, direction, "milliseconds", lines)
    figure.suptitle(_subject(records, "Attention of one layer"), color=_INK)
    _save(figure, path)


def draw_decode(records: list[Record], path: Path) -> None:
    """Microseconds of one decoding step against the context, a panel for each batch."""
    decoded = [record for record in records if record["name"].startswith("decode/")]
    batches = sorted({record["batch"] for record in decoded})
    count = max(1, len(batches))
    figure = Figure(figsize=(1.2 + 3.6 * count, 4.4), layout="constrained", facecolor="white")
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes, batch in zip(panels, batches, strict=False):
        lines = {}
        for op, style in DECODE_LINES.items():
            points = [
                (record["context"], record["value"])
                for record in decoded
                if record["batch"] == batch and record["name"].split("/")[1] == op
            ]
            if points:
                lines[style] = sorted(points)
        _plot(axes, f"batch {batch}", "microseconds", lines)
    figure.suptitle(_subject(records, "Decoding one token, one layer"), color=_INK)
    _save(figure, path)


def draw_occupancy(records: list[Record], path: Path) -> None:
    """The kernels of each pass by their share of the time, each with its occupancy."""
    passes = passes_of(records)
    figure = Figure(figsize=(11, 1 + 1.3 * len(passes)), layout="constrained", facecolor="white")
    panels = figure.subplots(-(-len(passes) // 2), 2, sharex=True, squeeze=False)
    for axes, each in zip(panels.flat, passes, strict=False):
        kernels = each.kernels[::-1]
        bars = axes.barh(
            [kernel.name.removesuffix("_kernel") for kernel in kernels],
            [100 * kernel.share for kernel in kernels],
            color="#4c6ef5",
        )
        axes.bar_label(bars, [f" {kernel.occupancy:.0%}" for kernel in kernels], color=_INK)
        axes.set_title(
            f"{each.name}: occupancy {each.occupancy:.0%}, products {each.products:.0%}", color=_INK
        )
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_FAINT)
    for axes in panels.flat[len(passes) :]:
        axes.set_visible(False)
    figure.supxlabel("share of the time, %; beside the bars occupancy", color=_INK, fontsize=10)
    figure.suptitle(f"Kernels of the whole op, {records[0]['device']}", color=_INK)
    _save(figure, path)


def _plot(
    axes: Axes,
    title: str,
    unit: str,
    lines: dict[tuple[str, str, str], list[tuple[int, float]]],
) -> None:
    """Lines over powers of two, which have labels, as has the longest context."""
    for (name, color, line), points in lines.items():
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=color, linestyle=line, marker="o", markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    contexts = sorted({x for points in lines.values() for x, _ in points})
    # Points between the powers of two have no room for a label.
    ticks = [x for x in contexts if x & (x - 1) == 0 or x == contexts[-1]]
    axes.set_xticks(ticks, [f"{round(x / 1024)}k" for x in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title(title, color=_INK)
    axes.set_xlabel("tokens of context", color=_INK)
    axes.set_ylabel(unit, color=_INK)
    axes.label_outer()
    axes.grid(color="#e9ecef")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    if lines:
        axes.legend(edgecolor="white", framealpha=0.9, fontsize=9)


def _subject(records: list[Record], what: str) -> str:
    first = next((r for r in records if "heads" in r), None)
    if first is None:
        return what
    return (
        f"{what}: {first['heads']} query and {first['groups']} key/value heads of "
        f"{first['key_width']}, bf16, {records[0]['device']}"
    )


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
