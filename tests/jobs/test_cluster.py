"""The door to Ray: a job that is told to stop ends in order."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import cluster
from jobs.ports import FIRST, LAST, LOOPBACK, free_ports
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
WAITING = """
import time
from jobs.cli import interruptible
from jobs.cluster import connect
with interruptible(), connect(num_cpus=1):
    print("connected", flush=True)
    time.sleep(3000)
"""


@pytest.mark.cluster
def test_whoever_is_told_to_stop_ends_with_130() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITING],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "connected\n"
        job.send_signal(signal.SIGTERM)
        _, errors = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 130
    assert errors == "error: interrupted; the same command goes on from here\n"


def test_ports_that_are_given_away_are_left_out() -> None:
    (port,) = free_ports(1)
    given = [each for each in range(FIRST, LAST + 1) if each != port]
    assert free_ports(1, but=given) == [port]


def test_jobs_that_start_at_the_same_moment_have_dashboards_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (usual,) = free_ports(1)
    monkeypatch.setattr(cluster, "DASHBOARD_PORT", usual)
    monkeypatch.setenv(cluster.DASHBOARD_VARIABLE, "before")
    with cluster._dashboard() as first, cluster._dashboard() as second:
        assert first == usual != second
        assert os.environ[cluster.DASHBOARD_VARIABLE] == f"http://{LOOPBACK}:{second}"
    assert os.environ[cluster.DASHBOARD_VARIABLE] == "before"
    with cluster._dashboard() as again:
        assert again == usual
