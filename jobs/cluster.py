"""One door to a Ray cluster: the one a job was submitted to, or a local one for its time."""

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.lock import InUseError, alone
from jobs.ports import LOOPBACK, free_ports, is_free
from nsa_platform.retry import first_line

# A cluster of this process alone, on loopback: no token to exchange, no report to anyone.
LOCAL_ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}

DASHBOARD_VARIABLE = "RAY_API_SERVER_ADDRESS"
DASHBOARD_PORT = 8265

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
        with _dashboard() as port:
            cpus = max(num_cpus or 0, os.cpu_count() or 1)
            _init(address="local", num_cpus=cpus, dashboard_port=port)
    try:
        yield
    finally:
        ray.shutdown()


def this_node() -> NodeAffinitySchedulingStrategy:
    """Place an actor beside its driver: what all hangs on must not go with a node of workers."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def lost_cluster(error: Exception) -> str:
    """A line for a person whose run has lost Ray: its head node, or that of its own actors."""
    return (
        "Ray's head node, or another that the run hung on, is gone; when the cluster is back the "
        f"same command goes on from the newest checkpoint ({type(error).__name__}: "
        f"{first_line(error)})"
    )


@contextmanager
def _dashboard() -> Iterator[int]:
    """A port for a local cluster's dashboard, and its address for the processes that start inside.

    Ray Train's watchdog asks it whether the training lives. Without an address it asks the cluster
    that some file or process on this machine points to, which may be another one or long gone.
    Of jobs that start at the same moment one has the usual port, though all find it free.
    """
    lock = Path(tempfile.gettempdir()) / f"nsa-platform-dashboard-{DASHBOARD_PORT}.lock"
    before = os.environ.get(DASHBOARD_VARIABLE)
    with ExitStack() as held:
        try:
            held.enter_context(alone(lock, what="the dashboard's port is taken"))
            is_ours = is_free(DASHBOARD_PORT)
        except (InUseError, OSError):  # a job's, or a file of another user's
            is_ours = False
        port = DASHBOARD_PORT if is_ours else free_ports(1)[0]
        os.environ[DASHBOARD_VARIABLE] = f"http://{LOOPBACK}:{port}"
        try:
            yield port
        finally:
            os.environ.pop(DASHBOARD_VARIABLE)
            if before is not None:
                os.environ[DASHBOARD_VARIABLE] = before


def _init(**options: Any) -> None:
    """ray.init, which leaves SIGTERM to whoever handled it before.

    Raises:
        ConnectionError: there is no such cluster, or none could be started.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options, **QUIET)
    except RuntimeError as error:
        raise ConnectionError(f"Ray does not start: {first_line(error)}") from error
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
