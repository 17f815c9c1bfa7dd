"""One door to a Ray cluster: the one a job was submitted to, or a local one for its time."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

# A cluster of this process alone, on loopback: no token to exchange, no report to anyone.
LOCAL_ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}

# Jobs show what their workers report to them; Ray's own lines and workers' output stay in its logs.
QUIET = {"logging_level": logging.ERROR, "log_to_driver": False}


@contextmanager
def connect(*, num_cpus: int | None = None) -> Iterator[None]:
    """Be connected to Ray inside the block.

    With RAY_ADDRESS in the environment (Ray sets it in submitted jobs) that cluster is used and
    left running. Otherwise a local cluster is started and stopped with the block. Inside another
    `connect` block the cluster is shared.

    Args:
        num_cpus: CPUs of the local cluster, at least; its default is all of the machine's.
            Workers that wait for each other must all fit, also on a machine with fewer cores.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _init(address=address)
    else:
        for name, value in LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        _init(address="local", num_cpus=max(num_cpus or 0, os.cpu_count() or 1))
    try:
        yield
    finally:
        ray.shutdown()


def _init(**options: Any) -> None:
    """ray.init, which leaves SIGTERM to whoever handled it before."""
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(**options, **QUIET)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
