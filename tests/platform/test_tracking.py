"""Runs in MLflow: whole, once, in order, whatever is killed or away."""

import contextlib
import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from nsa_platform.config.train import TrackingConfig
from nsa_platform.tracking import (
    RunHandle,
    SystemMonitor,
    Tracker,
    TrackingError,
    fetch_model,
    open_run,
    register_model,
    source_run,
)
from nsa_platform.tracking.handle import artifact_root, new_handle
from nsa_platform.tracking.journal import Journal
from nsa_platform.tracking.library import MlflowClient
from nsa_platform.tracking.store import connect
from tests.mlflow_server import Server
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    """One SQLite store for all tests of this file; making one costs seconds."""
    return TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('store')}/db/mlflow.db")


@pytest.fixture
def queue_dir(tmp_path: Path) -> Path:
    return tmp_path / "tracking-queue"


def begin(
    config: TrackingConfig,
    queue_dir: Path,
    *,
    run_id: str | None = None,
    yaml_text: str = "a: 1\n",
    params: dict[str, object] | None = None,
) -> RunHandle:
    return open_run(
        config,
        job="pretrain",
        name="run",
        params=params or {"train": {"steps": 6}},
        tags={"nsa.attention": "nsa"},
        yaml_text=yaml_text,
        queue_dir=queue_dir,
        run_id=run_id,
    )


def client_of(config: TrackingConfig) -> MlflowClient:
    return connect(config.uri)


def history(config: TrackingConfig, run_id: str | None, name: str) -> list[tuple[int, float]]:
    """(step, value) in the order of arrival."""
    assert run_id is not None
    points = client_of(config).get_metric_history(run_id, name)
    return [(point.step, point.value) for point in points]


def assert_whole(config: TrackingConfig, run_id: str | None, name: str, steps: range) -> None:
    """Every step once, ascending, with the value that `worker_code` and the tests give it."""
    assert history(config, run_id, name) == [(step, step / 2) for step in steps]


def worker_code(handle: RunHandle, start: int, *, pause_s: float = 0.0) -> str:
    """A process that records train/loss = step / 2 without end, and says each step."""
    return f"""
import itertools, pickle, time
from nsa_platform.tracking import Tracker
tracker = Tracker(pickle.loads({pickle.dumps(handle)!r}))
for step in itertools.count({start}):
    tracker.log_metrics({{"train/loss": step / 2}}, step)
    print(step, flush=True)
    time.sleep({pause_s})
"""


@contextlib.contextmanager
def spawned(code: str, *, cwd: Path) -> Iterator["subprocess.Popen[str]"]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/platform:{ROOT}/kernels:{ROOT}"}
    command = [sys.executable, "-W", "error", "-c", code]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=cwd, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def kill_after(process: "subprocess.Popen[str]", step: int) -> int:
    """kill -9 once the process has said `step`; returns the last step it said."""
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= step:
            break
    process.send_signal(signal.SIGKILL)
    said = [int(line) for line in process.stdout]
    process.wait()
    return max([step, *said])


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of loopback where nobody answers, kept from others that look for a free one."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_a_run_holds_everything_that_was_recorded(config: TrackingConfig, queue_dir: Path) -> None:
    handle = begin(config, queue_dir)
    assert handle.run_id is not None
    client = client_of(config)
    assert client.get_run(handle.run_id).info.status == "RUNNING"

    tracker = Tracker(handle)
    for step in range(1, 6):
        tracker.log_metrics({"train/loss": step / 2, "train/tokens": step * 100}, step)
    tracker.log_metrics({"train/broken": float("nan")}, 1)
    figure = Figure()
    figure.subplots().plot([1, 2])
    tracker.log_figure(figure, "figures/loss.png")
    tracker.log_table(["prompt", "answer"], [["a", 1]], "samples/step_5.json")
    tracker.log_dict({"x": 1}, "results.json")
    (queue_dir / "note.txt").write_text("note")
    tracker.log_file(queue_dir / "note.txt", "notes")
    manifest = {"digest": "d" * 64, "kind": "text", "tokens": 7, "shards": [{"name": "x"}]}
    tracker.log_dataset(manifest, "text", "training", source="/data/train")
    assert tracker.finish("FINISHED") == 0

    run = client.get_run(handle.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params == {"train.steps": "6"}
    assert run.data.tags["nsa.job"] == "pretrain"
    assert run.data.tags["nsa.attention"] == "nsa"
    assert len(run.data.tags["nsa.config_fingerprint"]) == 12
    assert len(run.data.tags["mlflow.source.git.commit"]) == 40
    assert_whole(config, handle.run_id, "train/loss", range(1, 6))
    assert len(history(config, handle.run_id, "train/broken")) == 1
    found = {
        file.path
        for folder in ("", "figures", "samples", "notes")
        for file in client.list_artifacts(handle.run_id, folder)
        if not file.is_dir
    }
    assert found == {
        "config.yaml",
        "results.json",
        "figures/loss.png",
        "samples/step_5.json",
        "notes/note.txt",
    }
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [
        {"path": "samples/step_5.json", "type": "table"}
    ]
    assert run.inputs is not None
    dataset = run.inputs.dataset_inputs[0]
    assert dataset.dataset.name == "text"
    assert dataset.dataset.digest == "d" * 36
    assert json.loads(str(dataset.dataset.profile)) == {
        "digest": "d" * 64,
        "kind": "text",
        "tokens": 7,
    }
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "training")]
    assert not list(queue_dir.glob("*.jsonl")), "nothing is left to deliver"
    assert not list((queue_dir / "blobs").iterdir())


def test_a_relative_store_is_the_same_in_every_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: TrackingConfig
) -> None:
    source = Path(config.uri.removeprefix("sqlite:///"))
    monkeypatch.chdir(source.parent.parent)
    relative = TrackingConfig(uri="sqlite:///db/mlflow.db")
    handle = begin(relative, Path("queue"))
    assert handle.uri == config.uri
    with spawned(worker_code(handle, 1), cwd=tmp_path) as process:
        last = kill_after(process, 3)
    Tracker(handle).finish(None)
    assert_whole(config, handle.run_id, "train/loss", range(1, last + 1))
    assert [path.name for path in tmp_path.iterdir()] == [], "nothing was made where the worker ran"


def test_resume_goes_on_in_the_same_run_without_double_points(
    config: TrackingConfig, queue_dir: Path
) -> None:
    handle = begin(config, queue_dir)
    first = Tracker(handle)
    for step in range(1, 8):
        first.log_metrics({"train/loss": step / 2}, step)
    assert first.finish("FAILED") == 0
    assert client_of(config).get_run(str(handle.run_id)).info.status == "FAILED"

    again = begin(
        config, queue_dir, run_id=handle.run_id, yaml_text="a: 2\n", params={"train": {"steps": 12}}
    )
    assert again.run_id == handle.run_id
    run = client_of(config).get_run(str(handle.run_id))
    assert run.info.status == "RUNNING"
    assert run.data.tags["nsa.attempts"] == "2"
    assert run.data.params == {"train.steps": "6"}
    assert run.data.tags["nsa.changed_params"] == "train.steps: 6 -> 12"

    second = Tracker(again)
    for step in range(5, 13):  # The checkpoint was at step 4.
        second.log_metrics({"train/loss": step / 2, "valid/loss": step / 2}, step)
    assert second.finish("FINISHED") == 0
    assert_whole(config, handle.run_id, "train/loss", range(1, 13))
    assert_whole(config, handle.run_id, "valid/loss", range(5, 13))
    assert client_of(config).get_run(str(handle.run_id)).info.status == "FINISHED"


def test_an_unfinished_run_is_continued_without_a_checkpoint(
    config: TrackingConfig, queue_dir: Path
) -> None:
    first = begin(config, queue_dir)
    assert begin(config, queue_dir).run_id == first.run_id, "killed before its first checkpoint"
    anew = open_run(
        config,
        job="evaluate",
        name="run",
        params={},
        tags={},
        yaml_text="a: 1\n",
        queue_dir=queue_dir,
        continues=False,
    )
    assert anew.run_id != first.run_id, "a job that starts over"
    other = begin(config, queue_dir, yaml_text="a: 3\n")
    assert other.run_id != first.run_id, "another configuration is another run"
    Tracker(other).finish("FINISHED")
    assert begin(config, queue_dir, yaml_text="a: 3\n").run_id != other.run_id, "it had finished"


def test_a_run_that_the_store_lost_goes_on_as_a_new_one(
    config: TrackingConfig, queue_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    handle = begin(config, queue_dir, run_id="0" * 32)
    assert handle.run_id not in (None, "0" * 32)
    assert "does not know run 0000" in caplog.text


def test_kill_9_loses_and_doubles_nothing(config: TrackingConfig, queue_dir: Path) -> None:
    handle = begin(config, queue_dir)
    with spawned(worker_code(handle, 1, pause_s=0.01), cwd=queue_dir) as process:
        killed_at = kill_after(process, 150)  # Past the first deliveries, in the middle of one.
    tracker = Tracker(handle)
    for step in range(killed_at - 5, killed_at + 50):  # Again from the newest checkpoint.
        tracker.log_metrics({"train/loss": step / 2}, step)
    assert tracker.finish("FINISHED") == 0
    assert_whole(config, handle.run_id, "train/loss", range(1, killed_at + 50))


def test_a_kill_between_delivery_and_bookkeeping_doubles_nothing(
    config: TrackingConfig, queue_dir: Path
) -> None:
    handle = begin(config, queue_dir)
    tracker = Tracker(handle)
    for step in range(1, 2500):  # More than two calls hold.
        tracker.log_metrics({"train/loss": step / 2}, step)
    tracker.log_text("hello", "text.txt")
    (journal,) = queue_dir.glob("*.jsonl")
    left_behind = journal.read_bytes()
    assert tracker.finish(None) == 0
    journal.write_bytes(left_behind + b'{"kind": "metrics", "step": 25')  # Torn by the kill.
    assert Tracker(handle).finish("FINISHED") == 0
    assert_whole(config, handle.run_id, "train/loss", range(1, 2500))
    assert not journal.exists()


def test_processes_that_race_to_create_a_run_share_one(
    config: TrackingConfig, queue_dir: Path
) -> None:
    handle = new_handle(
        config.uri,
        "race",
        artifacts=artifact_root(config.uri, None),
        name="race",
        queue_dir=queue_dir,
    )
    begin(config, queue_dir)
    trackers = [
        Tracker(replace(handle, queue_dir=str(queue_dir / str(i)), started_s=time.time() + i))
        for i in range(4)
    ]
    watcher = Tracker(replace(handle, queue_dir=str(queue_dir / "w")), creates_run=False)
    for i, tracker in enumerate(trackers):
        tracker.log_metrics({f"train/{i}": 1.0}, 1)
    assert [tracker.finish(None) for tracker in trackers] == [0] * 4
    assert watcher.finish(None) == 0
    assert len({tracker.run_id for tracker in [*trackers, watcher]}) == 1
    client = client_of(config)
    experiment = client.get_experiment_by_name("race")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert set(run.data.metrics) == {f"train/{i}" for i in range(4)}


def test_what_the_store_refuses_does_not_block_the_rest(
    config: TrackingConfig, queue_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    handle = begin(config, queue_dir)
    tracker = Tracker(handle)
    tracker.set_tags({"bad\nname": "x"})
    tracker.log_metrics({"train/loss": 0.5}, 1)
    assert tracker.finish("FINISHED") == 1
    assert "refuses tags" in caplog.text
    assert_whole(config, handle.run_id, "train/loss", range(1, 2))
    assert "bad\\nname" in (queue_dir / "rejected.jsonl").read_text()


def test_wrong_arguments_are_errors_at_once(config: TrackingConfig, queue_dir: Path) -> None:
    tracker = Tracker(begin(config, queue_dir))
    with pytest.raises(ValueError, match="metric name 'mfu %'"):
        tracker.log_metrics({"mfu %": 1.0}, 1)
    with pytest.raises(ValueError, match=r"must end in \.json"):
        tracker.log_table(["a"], [[1]], "table.csv")
    with pytest.raises(ValueError, match="a row of 2 for 1 columns"):
        tracker.log_table(["a"], [[1, 2]], "table.json")
    assert tracker.finish(None) == 0
    assert tracker.finish(None) == 0, "finishing again does nothing"


def test_every_node_is_sampled_and_its_steps_ascend_over_a_resume(
    config: TrackingConfig, queue_dir: Path
) -> None:
    handle = begin(config, queue_dir)
    for _ in range(2):
        tracker = Tracker(handle)
        monitor = SystemMonitor(tracker, node="node 1", interval_s=1)
        time.sleep(1.2)
        monitor.stop()
        assert tracker.finish(None) == 0
    points = history(config, handle.run_id, "system/node-1/cpu_utilization_percentage")
    steps = [step for step, _ in points]
    assert len(steps) >= 2
    assert steps == sorted(set(steps))
    with pytest.raises(ValueError, match="interval_s"):
        SystemMonitor(tracker, interval_s=0.1)


def test_a_model_is_registered_once_and_fetched_by_alias(
    config: TrackingConfig, queue_dir: Path, tmp_path: Path
) -> None:
    handle = begin(config, queue_dir)
    Tracker(handle).finish("FINISHED")
    folder = tmp_path / "model"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer" / "tokenizer.json").write_text("[]")
    assert register_model(handle, folder, "nsa-test", "champion") == 1
    assert register_model(handle, folder, "nsa-test", "champion") == 1, "the same files"
    (folder / "config.json").write_text('{"new": 1}')
    assert register_model(handle, folder, "nsa-test", "champion") == 2

    fetched = fetch_model("models:/nsa-test@champion", config.uri, tmp_path / "cache")
    assert (fetched / "config.json").read_text() == '{"new": 1}'
    assert (fetched / "tokenizer" / "tokenizer.json").read_text() == "[]"
    assert fetch_model("models:/nsa-test@champion", config.uri, tmp_path / "cache") == fetched
    first = fetch_model("models:/nsa-test/1", config.uri, tmp_path / "cache")
    assert (first / "config.json").read_text() == "{}"
    assert source_run("models:/nsa-test@champion", config.uri) == handle.run_id

    with pytest.raises(TrackingError, match="no model 'nsa-test' with the alias 'other'"):
        fetch_model("models:/nsa-test@other", config.uri, tmp_path / "cache")
    with pytest.raises(TrackingError, match="not found"):
        fetch_model("models:/nsa-test/9", config.uri, tmp_path / "cache")
    with pytest.raises(ValueError, match="must look like"):
        fetch_model("models:/nsa-test", config.uri, tmp_path / "cache")
    with pytest.raises(TrackingError, match="there is no model to register"):
        register_model(handle, tmp_path / "nothing", "nsa-test", "champion")


def test_an_absent_server_stops_nothing_and_what_is_kept_is_counted(
    queue_dir: Path, closed_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrackingConfig(uri=f"http://127.0.0.1:{closed_port}")
    handle = begin(config, queue_dir)
    assert handle.run_id is None
    tracker = Tracker(handle)
    for step in range(1, 1001):
        tracker.log_metrics({"train/loss": step / 2}, step)
    caplog.clear()
    left = tracker.finish("FINISHED")
    assert left == 1000 + 1 + 4, "points, status, and what open_run has queued"
    (line,) = [r.getMessage() for r in caplog.records if "did not reach" in r.getMessage()]
    assert line.startswith("1005 points and files of run 'run' did not reach http://127.0.0.1")
    assert str(queue_dir) in line


@pytest.mark.timeout(120)
def test_a_server_that_never_answers_blocks_nobody(
    queue_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever waited for the answer would wait for hours.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "9999")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = TrackingConfig(uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        handle = new_handle(config.uri, "nsa", artifacts=None, name="run", queue_dir=queue_dir)
        tracker = Tracker(handle)
        tracker.log_metrics({"train/loss": 1.0}, 1)
        assert tracker.finish("FINISHED", timeout_s=1.0) == 2


def test_a_full_disk_keeps_points_in_memory(
    config: TrackingConfig, queue_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = begin(config, queue_dir)

    def refuse(journal: Journal, entry: object) -> None:
        raise OSError(28, "No space left on device")

    tracker = Tracker(handle)
    monkeypatch.setattr(Journal, "append", refuse)
    tracker.log_metrics({"train/loss": 0.5}, 1)
    assert tracker.finish(None) == 0
    assert_whole(config, handle.run_id, "train/loss", range(1, 2))


def test_nothing_is_said_when_all_goes_well(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from nsa_platform.config.train import TrackingConfig
from nsa_platform.tracking import Tracker, open_run, register_model
config = TrackingConfig(uri="sqlite:///new/mlflow.db")
handle = open_run(config, job="pretrain", name="run", params={{}}, tags={{}}, yaml_text="",
                  queue_dir=Path("queue"))
tracker = Tracker(handle)
tracker.log_metrics({{"train/loss": 1.0}}, 1)
assert tracker.finish("FINISHED") == 0
register_model(handle, {str(ROOT / "jobs" / "configs")!r}, "m", "champion")
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/platform:{ROOT}/kernels:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "queue"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "mlartifacts",
        "mlflow.db",
    ]


@pytest.fixture
def server(tmp_path: Path, config: TrackingConfig) -> Iterator[Server]:
    """Not started yet. Its store is a copy of one that has its tables."""
    connect(config.uri, creates=True)
    server = Server(tmp_path, Path(config.uri.removeprefix("sqlite:///")))
    try:
        yield server
    finally:
        server.kill()


@pytest.mark.cluster
def test_a_real_server_may_come_late_die_and_return(
    server: Server, queue_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    handle = begin(server.config, queue_dir)
    assert handle.run_id is None, "the server is not there yet"
    early = Tracker(handle)
    for step in range(1, 11):
        early.log_metrics({"train/loss": step / 2}, step)
    assert early.finish(None) == 10 + 4

    server.start()
    tracker = Tracker(handle)
    for step in range(11, 21):
        tracker.log_metrics({"train/loss": step / 2}, step)
    eventually(lambda: tracker.run_id is not None, "the run is created")
    eventually(lambda: len(history(server.config, tracker.run_id, "train/loss")) == 20, "points")

    server.kill()
    for step in range(21, 31):
        tracker.log_metrics({"train/loss": step / 2}, step)
    tracker.log_text("kept while the server was away", "note.txt")
    eventually(lambda: "does not take points now" in caplog.text, "somebody notices")
    server.start()
    assert tracker.finish("FINISHED") == 0
    assert_whole(server.config, tracker.run_id, "train/loss", range(1, 31))
    client = client_of(server.config)
    run = client.get_run(str(tracker.run_id))
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train.steps": "6"}
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "config.yaml",
        "note.txt",
    }

    again = begin(server.config, queue_dir, run_id=tracker.run_id)
    assert again.run_id == tracker.run_id
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.bin").write_bytes(b"\0" * 100_000)
    assert register_model(again, tmp_path / "model", "served", "champion") == 1
    fetched = fetch_model("models:/served@champion", server.config.uri, tmp_path / "cache")
    assert (fetched / "weights.bin").stat().st_size == 100_000
