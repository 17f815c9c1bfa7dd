"""One door to a Ray cluster: the one a job was submitted to, or a local one for its time."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

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
        ray.init(address=address, **QUIET)
    else:
        for name, value in LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        ray.init(
            address="local",
            num_cpus=max(num_cpus or 0, os.cpu_count() or 1),
            **QUIET,
        )
    try:
        yield
    finally:
        ray.shutdown()
