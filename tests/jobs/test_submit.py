"""Submission: what is sent, what is refused, and a job on a real Ray cluster."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.submit import ROOT, build, main
from nsa_platform.config.base import ConfigError

CONFIG = "jobs/configs/pretrain/smoke.yaml"
LOCAL = "http://127.0.0.1:8265"

# Ray's client asks aiohttp for its log stream in a way that aiohttp has come to deprecate.
pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_equivalent_command_line_is_whole() -> None:
    submission, _ = build("pretrain", CONFIG, ["train.steps=5"], LOCAL)
    line = submission.command_line()
    assert line.startswith(f"ray job submit --address {LOCAL} --working-dir . ")
    assert f"-- python -m jobs.pretrain --config {CONFIG} --set train.steps=5" in line
    assert "platform/nsa_platform" in line
    assert "kernels/nsa_kernels" in line


def test_relative_places_become_absolute_on_this_machine() -> None:
    submission, _ = build("pretrain", CONFIG, [], "http://localhost:8265")
    assert f"--set storage={ROOT}/runs" in submission.entrypoint


def test_a_remote_cluster_cannot_see_relative_places() -> None:
    with pytest.raises(ConfigError, match=r"cannot see places relative.*storage=runs"):
        build("pretrain", CONFIG, [], "http://head.example:8265")
    places = [
        "storage=s3://b/runs",
        "data.path=s3://b/data",
        "tracking.uri=http://mlflow.example:5000",
    ]
    submission, _ = build("pretrain", CONFIG, places, "http://head.example:8265")
    assert "--set storage=s3://b/runs" in submission.entrypoint


def test_a_configuration_that_does_not_travel_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text((ROOT / CONFIG).read_text())
    with pytest.raises(ConfigError, match="must lie inside the repository"):
        build("pretrain", str(path), [], LOCAL)


def test_a_wrong_key_submits_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["pretrain", "--config", CONFIG, "--set", "train.stpes=3"])
    assert caught.value.code == 2
    assert "did you mean 'steps'" in capsys.readouterr().err


def test_dry_run_prints_and_stops(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--config", CONFIG, "--dry-run"]) == 0
    assert "ray job submit" in capsys.readouterr().out


def test_no_cluster_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    address = f"http://127.0.0.1:{_free_port()}"
    with pytest.raises(SystemExit) as caught:
        main(["pretrain", "--config", CONFIG, "--address", address])
    assert caught.value.code == 1
    assert f"{address} did not take the job" in capsys.readouterr().err


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster as a user starts it: `ray start --head`, stopped with everything it started."""
    dashboard = _free_port()
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    # The job's driver connects as its cluster does, whatever the shell of the tests says.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    head = subprocess.Popen(
        ["ray", "start", "--head", "--block", "--num-cpus=3", f"--port={_free_port()}",
         "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
         # Fixed otherwise, and taken if another cluster runs on this machine.
         f"--dashboard-agent-listen-port={_free_port()}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _wait_for(f"127.0.0.1:{dashboard}")
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        head.terminate()
        head.wait(timeout=60)


def _wait_for(address: str) -> None:
    host, _, port = address.partition(":")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.5)
    pytest.fail(f"the cluster's dashboard does not answer at {address}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.cluster
def test_pretrain_then_sft_on_a_cluster(
    cluster: str,
    tiny_shards: Any,
    tiny_chat_shards: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    places = [
        "--set", f"storage={tmp_path}/runs",
        "--set", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
        "--address", cluster,
    ]  # fmt: skip
    text = ["--set", f"data.path={tiny_shards.path}", "--set", "model.vocab_size=512"]
    assert main(["pretrain", "--config", CONFIG, *text, *places]) == 0
    said = capfd.readouterr().out
    assert "step 10/10" in said and "SUCCEEDED" in said
    assert f"Dashboard  {cluster}/#/jobs/" in said
    chat = ["--set", f"data.path={tiny_chat_shards.path}"]
    start = ["--set", f"checkpoint={tmp_path}/runs/smoke/model"]
    sft = ["sft", "--config", "jobs/configs/sft/smoke.yaml", *chat, *start, *places]
    assert main(sft) == 0
    assert (tmp_path / "runs/smoke-sft/model/model.safetensors").exists()


@pytest.mark.cluster
def test_a_failing_job_fails_here_too(
    cluster: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = ["--set", f"data.path={tmp_path}/nothing", "--set", f"storage={tmp_path}/runs"]
    assert main(["pretrain", "--config", CONFIG, *broken, "--address", cluster]) == 1
    said = capfd.readouterr()
    assert f"{tmp_path}/nothing" in said.out
    assert "FAILED" in said.out
