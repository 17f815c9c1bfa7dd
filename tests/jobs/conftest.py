"""A dashboard's port for the clusters of each test worker: two would take the usual one at once."""

import os

from jobs import cluster, ports

if "PYTEST_XDIST_WORKER" in os.environ:
    cluster.DASHBOARD_PORT = ports.LAST + 1
