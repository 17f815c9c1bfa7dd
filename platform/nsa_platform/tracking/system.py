"""CPU, memory, disk, network and GPU of a node, sampled into a run."""

from __future__ import annotations

import re
import socket
import threading
import time
from typing import TYPE_CHECKING

from nsa_platform.tracking import library
from nsa_platform.tracking.tracker import Tracker

if TYPE_CHECKING:
    from nsa_platform.tracking.library import BaseMetricsMonitor


class SystemMonitor:
    """Samples this node in the background into `system/<node>/<metric>`, MLflow's own names.

    Local rank 0 of every node starts one. MLflow's samplers measure; the points take the tracker's
    road, so an absent store does not end them. A point's step is the run's age in seconds: it goes
    on ascending when a run is resumed.
    """

    def __init__(
        self, tracker: Tracker, *, node: str | None = None, interval_s: float = 10.0
    ) -> None:
        """Start sampling. `node` defaults to the host's name.

        Raises:
            ValueError: interval_s is less than 1: steps count whole seconds.
        """
        if interval_s < 1:
            raise ValueError(f"interval_s={interval_s} must be at least 1")
        self._tracker = tracker
        self._prefix = f"system/{re.sub(r'[^A-Za-z0-9_.-]', '-', node or socket.gethostname())}"
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample_all, name="system", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample and stop; before the tracker's finish()."""
        self._stopped.set()
        self._thread.join()

    def _sample_all(self) -> None:
        monitors = _monitors()
        while not self._stopped.wait(self._interval_s):
            self._sample(monitors)
        self._sample(monitors)

    def _sample(self, monitors: list[BaseMetricsMonitor]) -> None:
        values: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            values.update(monitor.aggregate_metrics() or {})
            monitor.clear_metrics()
        step = int(time.time() - self._tracker.handle.started_s)
        self._tracker.log_metrics({f"{self._prefix}/{k}": v for k, v in values.items()}, step)


def _monitors() -> list[BaseMetricsMonitor]:
    monitors: list[BaseMetricsMonitor] = [
        library.CPUMonitor(),
        library.DiskMonitor(),
        library.NetworkMonitor(),
    ]
    try:
        monitors.append(library.GPUMonitor())
    except (ImportError, RuntimeError):
        pass  # No NVIDIA GPU here, or its management library is not installed.
    for monitor in monitors:
        # Shares of time are measured between two looks: the first look only starts the clock.
        monitor.collect_metrics()
        monitor.clear_metrics()
    return monitors
