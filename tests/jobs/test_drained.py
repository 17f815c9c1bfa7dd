"""An elastic run on a Ray cluster of two nodes, of which one is drained and then taken away."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from jobs.cluster import LOCAL_ENVIRONMENT
from nsa_platform.tracking.library import MlflowClient
from tests.waiting import PATIENCE_S, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(6 * PATIENCE_S)]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 200
CHANGES = {
    "model.vocab_size": 512,
    "data.context_length": 128,
    "train.steps": STEPS,
    "train.tokens_per_step": 256,
    "train.sequences_per_microbatch": 1,
    "train.validate_every_steps": STEPS,
    "train.validation_tokens": 640,
    # No checkpoint on the way: what is kept, the notice has saved.
    "train.checkpoint.every_steps": STEPS,
    "cluster.num_workers": 2,
    "cluster.min_workers": 1,
}


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Each has room for one worker."""
    # Ray Train looks for workers that are gone, and gives up those that find no room, sooner.
    patience = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    }
    for name, value in (LOCAL_ENVIRONMENT | patience).items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", str(cluster.address))
        yield cluster
    finally:
        cluster.shutdown()


def said(driver: subprocess.Popen, log: Path, words: str) -> None:
    """Wait until the driver says so; it must not end before."""
    eventually(lambda: words in log.read_text() or driver.poll() is not None, words)
    assert words in log.read_text() and driver.poll() is None, log.read_text()[-3000:]


def test_a_node_is_drained_and_one_worker_goes_on(two_nodes: Cluster, tiny_shards, tmp_path):
    tracking = f"sqlite:///{tmp_path}/mlflow.db"
    places = {"data.path": tiny_shards.path, "tracking.uri": tracking, "storage": tmp_path}
    changes = {"name": "drained", **CHANGES, **places}
    command = [
        sys.executable,
        "-m",
        "jobs.pretrain",
        "--config",
        "jobs/configs/pretrain/smoke.yaml",
    ]
    command += [f"--set={name}={value}" for name, value in changes.items()]
    log = tmp_path / "driver.log"
    with log.open("wb") as output:
        driver = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        said(driver, log, "step 1/")
        node = two_nodes.list_all_nodes()[1]
        drain = ["ray", "drain-node", "--address", two_nodes.address, "--node-id", node.node_id]
        drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back"]
        subprocess.run([*drain, "--deadline-remaining-seconds", "600"], check=True)
        said(driver, log, "saved step")
        two_nodes.remove_node(node)
        assert driver.wait(PATIENCE_S) == 0, log.read_text()[-3000:]
    finally:
        if driver.poll() is None:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
    output = log.read_text()
    saved = re.search(r"saved step (\d+): worker \d: ", output)
    assert saved and f"goes on from the checkpoint of step {saved[1]}\n" in output
    client = MlflowClient(tracking)
    (run,) = client.search_runs(["1"], filter_string="attributes.run_name = 'drained'")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, STEPS + 1))
    assert run.info.status == "FINISHED"
