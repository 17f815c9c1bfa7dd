"""A server in pictures: latencies, and what scaling costs and misses."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from nsa_platform.figures.canvas import FAINT, INK, VALID, canvas, dress


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
