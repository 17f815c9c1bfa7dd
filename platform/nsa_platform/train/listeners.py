"""Who is told how a run gets on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nsa_platform.tracking import Tracker

Metrics = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Listeners:
    """Told by every worker alike; the tracker by the first worker alone."""

    report: Callable[[int, Metrics], None]
    """Told the step and its metrics whenever something is logged."""
    say: Callable[[str], None]
    """Told a line that a person should read."""
    tracker: Tracker | None = None
    awaited: Callable[[int], None] = lambda step: None
    """Told the step of each checkpoint that is whole and awaits validation."""

    def tell(self, step: int, metrics: Metrics) -> None:
        """Metrics of a step, if there are any."""
        if not metrics:
            return
        if self.tracker is not None:
            self.tracker.log_metrics(metrics, step)
        self.report(step, metrics)
