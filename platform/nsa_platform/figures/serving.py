"""A server in pictures: latencies, and what scaling costs and misses."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from nsa_platform.figures.canvas import FAINT, INK, TRAIN, VALID, canvas, dress, note

DASHES = ("--", "-", "-.", ":")
"""Of lines that differ in the number of sequences alone, the fewest first."""


def decode_arithmetic(
    lines: Mapping[str, Sequence[tuple[int, float, float]]], *, ridge: float, title: str
) -> Figure:
    """Two panels against the context: bytes that a step reads, and operations for each of them.

    Args:
        lines: system -> points of (context, bytes, operations per byte).
        ridge: operations per byte at which a device's products take as long as its memory.
    """
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    figure.suptitle(title, color=INK)
    read, intensity = figure.subplots(1, 2)
    dress(read, "what is read", x="tokens of context", y="MiB")
    dress(intensity, "arithmetic intensity", x="tokens of context", y="FLOPs per byte")
    # Full attention is broad and below the lines that it shares bytes or intensity with.
    styles = {"nsa": (VALID, "-", 1.8, 3), "full": (TRAIN, "-", 6.0, 2), "mla": (INK, "-.", 1.4, 3)}
    for system, points in lines.items():
        color, line, width, order = styles[system]
        style = {"color": color, "label": system, "linewidth": width, "zorder": order}
        contexts = [context for context, _, _ in points]
        sizes = [size / 2**20 for _, size, _ in points]
        read.plot(contexts, sizes, line, **style)
        intensity.plot(contexts, [ratio for *_, ratio in points], line, **style)
    intensity.axhline(ridge, color=INK, linewidth=0.8)
    note = f" {ridge:.0f}: products as slow as memory, H100 as measured"
    intensity.text(min(min(p)[0] for p in lines.values()), ridge * 1.08, note, fontsize=8)
    for axes in (read, intensity):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    intensity.set_ylim(1, 4 * ridge)
    read.legend()
    return figure


def latencies(times_ms: Mapping[str, Sequence[float]], *, title: str) -> Figure:
    """Share of waits that were over after so many milliseconds: one curve for each kind of wait."""
    figure, axes = canvas(title, x="milliseconds", y="share of waits that are over")
    for name, values in times_ms.items():
        ordered = sorted(values)
        shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
        axes.step(ordered, shares, where="post", linewidth=1.8, label=name)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if times_ms:
        axes.legend(frameon=False)
    return figure


def decode_speeds(speeds: Mapping[tuple[str, int], Mapping[int, float]], *, title: str) -> Figure:
    """Tokens a second against the context, and how many times faster the first kind is.

    Args:
        speeds: tokens a second by context, for each kind of attention and number of sequences at
            most.
    """
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    figure.suptitle(title, color=INK)
    left, right = figure.subplots(1, 2)
    kinds = list(dict.fromkeys(kind for kind, _ in speeds))
    batches = sorted({size for _, size in speeds})
    dress(left, "Tokens per second", x="tokens of context", y="")
    for kind, size in speeds:
        line = sorted(speeds[kind, size].items())
        color = FAINT if kinds.index(kind) else VALID
        style = DASHES[batches.index(size) % len(DASHES)]
        label = f"{kind}, up to {size} at once" if size > 1 else f"{kind}, one alone"
        left.plot(*zip(*line, strict=True), style, color=color, label=label, marker=".")
    left.set_yscale("log")
    left.legend(frameon=False)
    first = kinds[0]
    dress(right, f"{first} against {' and '.join(kinds[1:])}", x="tokens of context", y="times")
    for kind, size in speeds:
        base = speeds.get((first, size), {})
        ratios = [(c, base[c] / v) for c, v in sorted(speeds[kind, size].items()) if c in base]
        if kind == first or not ratios:
            continue
        style = DASHES[batches.index(size) % len(DASHES)]
        right.plot(*zip(*ratios, strict=True), style, color=VALID, marker=".")
        note(right, *ratios[-1], f"{ratios[-1][1]:.1f}", above=True)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: _short(tokens)))
        axes.margins(x=0.08, y=0.1)
    right.set_ylim(bottom=0)
    return figure


def _short(tokens: float) -> str:
    """131072 as 128k."""
    return f"{tokens / 1024:g}k" if tokens < 2**20 else f"{tokens / 2**20:g}M"


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
    figure.suptitle(title, color=INK)
    left, right = figure.subplots(1, 2)
    dress(left, "Late first tokens against cost", x="replica-seconds", y="late or refused")
    for place, (name, (cost, missed)) in enumerate(points.items()):
        left.scatter([cost], [missed], color=FAINT if place else VALID, s=60, zorder=3)
        left.annotate(name, (cost, missed), xytext=(7, 5), textcoords="offset points", color=INK)
    left.set_ylim(bottom=0)
    left.margins(x=0.2)
    dress(right, "Replicas over time", x="seconds", y="")
    for place, (name, line) in enumerate(steps.items()):
        times, counts = zip(*line, strict=True)
        color = FAINT if place else VALID
        right.step(times, counts, where="post", color=color, label=name, linewidth=1.8)
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    return figure
