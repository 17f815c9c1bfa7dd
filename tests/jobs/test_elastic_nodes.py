"""Elastic runs on a Ray cluster: of two nodes one is drained and goes, or the second one comes."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from jobs.cluster import LOCAL_ENVIRONMENT
from nsa_platform.tracking.library import MlflowClient
from tests.waiting import PATIENCE_S, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(6 * PATIENCE_S)]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 200
# Ray looks for new nodes every 20 seconds.
STEPS_TO_GROW_IN = 900
CHANGES = {
    "model.vocab_size": 512,
    "data.context_length": 128,
    "train.tokens_per_step": 256,
    "train.sequences_per_microbatch": 1,
    "train.validation_tokens": 640,
    "cluster.num_workers": 2,
    "cluster.min_workers": 1,
    "cluster.grow_check_s": 3,
}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """One node. Each node of it has room for one worker."""
    # Ray Train looks for workers that are gone, and gives up those that find no room, sooner.
    patience = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    }
    for name, value in (LOCAL_ENVIRONMENT | patience).items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        monkeypatch.setenv("RAY_ADDRESS", str(cluster.address))
        yield cluster
    finally:
        cluster.shutdown()


@contextmanager
def driver_of(
    name: str, shards: str, folder: Path, *, steps: int
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The process of a run, which does not outlive this, and its output."""
    settings = {
        "name": name,
        "train.steps": steps,
        "train.validate_every_steps": steps,
        # No checkpoint on the way: what is kept, a notice has saved.
        "train.checkpoint.every_steps": steps,
        "data.path": shards,
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
        "storage": folder,
    }
    command = [sys.executable, "-m", "jobs.pretrain"]
    command += ["--config", "jobs/configs/pretrain/smoke.yaml"]
    command += [f"--set={key}={value}" for key, value in (CHANGES | settings).items()]
    log = folder / "driver.log"
    with log.open("wb") as output:
        driver = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        yield driver, log
    finally:
        if driver.poll() is None:
            driver.send_signal(signal.SIGKILL)
            driver.wait()


def said(driver: subprocess.Popen[bytes], log: Path, words: str) -> None:
    """Wait until the driver says so; it must not end before."""
    eventually(lambda: words in log.read_text() or driver.poll() is not None, words)
    assert words in log.read_text() and driver.poll() is None, log.read_text()[-3000:]


def went_on(driver: subprocess.Popen[bytes], log: Path, name: str, why: str, *, steps: int) -> None:
    """The run tells why it stops, goes on where it was, and ends with every step once."""
    assert driver.wait(PATIENCE_S) == 0, log.read_text()[-3000:]
    output = log.read_text()
    again = re.search(rf"{why}.*goes on from the checkpoint of step (\d+)\n", output, re.DOTALL)
    assert again and 0 < int(again[1]) < steps, output[-3000:]
    client = MlflowClient(f"sqlite:///{log.parent}/mlflow.db")
    (run,) = client.search_runs(["1"], filter_string=f"attributes.run_name = '{name}'")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, steps + 1))
    assert run.info.status == "FINISHED"


def test_a_node_is_drained_and_one_worker_goes_on(cluster: Cluster, tiny_shards, tmp_path):
    node = cluster.add_node(num_cpus=1)
    with driver_of("drained", tiny_shards.path, tmp_path, steps=STEPS) as (driver, log):
        said(driver, log, "step 1/")
        drain = ["ray", "drain-node", "--address", cluster.address, "--node-id", node.node_id]
        drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back"]
        subprocess.run([*drain, "--deadline-remaining-seconds", "600"], check=True)
        said(driver, log, "saved step")
        cluster.remove_node(node)
        went_on(driver, log, "drained", r"saved step \d+: worker \d: ", steps=STEPS)


def test_a_node_comes_and_two_workers_go_on(cluster: Cluster, tiny_shards, tmp_path):
    with driver_of("grown", tiny_shards.path, tmp_path, steps=STEPS_TO_GROW_IN) as (driver, log):
        said(driver, log, "step 1/")
        cluster.add_node(num_cpus=1)
        went_on(driver, log, "grown", "the cluster has room for 2 workers", steps=STEPS_TO_GROW_IN)
