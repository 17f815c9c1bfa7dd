"""Submission: what is sent and what is refused; test_stack.py submits to a real cluster."""

import socket
from pathlib import Path

import pytest

from jobs.submit import ROOT, build, main
from nsa_platform.config.base import ConfigError

CONFIG = "jobs/configs/pretrain/smoke.yaml"
LOCAL = "http://127.0.0.1:8265"


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
    # Bound and not listening: nobody answers there, and nobody else takes it.
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(SystemExit) as caught:
            main(["pretrain", "--config", CONFIG, "--address", address])
    assert caught.value.code == 1
    assert f"{address} did not take the job" in capsys.readouterr().err
