"""jobs.stack: a real cluster on this machine, submitted to, from pretraining to batch inference."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import stack, submit
from jobs.postgres import find_programs
from jobs.services import Service, ServiceError, end_all, family_of, is_alive
from nsa_platform import storage
from tests.waiting import PATIENCE_S, eventually

ROOT = Path(__file__).resolve().parents[2]
ANY_PORTS = ("--dashboard-port=0", "--mlflow-port=0", "--s3-port=0")
# Ray's client asks aiohttp for its log stream in a way that aiohttp has come to deprecate.
pytestmark = [
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),
    pytest.mark.timeout(6 * PATIENCE_S),
]


class RunningStack:
    """`python -m jobs.stack` on free ports, as a person starts it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._output = folder.with_name(f"{folder.name}.log")
        command = [sys.executable, "-m", "jobs.stack", "--folder", str(folder), "--num-cpus=3"]
        command += ANY_PORTS
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        self.environment = self._wait()

    @property
    def said(self) -> str:
        return self._output.read_text()

    def end(self, number: signal.Signals) -> list[psutil.Process]:
        """Send a signal and wait; what is left of all processes that there were."""
        family = family_of(self.process.pid)
        assert len(family) > 8, self.said
        self.process.send_signal(number)
        self.process.wait(PATIENCE_S)
        return [each for each in family if is_alive(each)]

    def _wait(self) -> dict[str, str]:
        file = self.folder / "environment.sh"

        def is_written() -> bool:
            assert self.process.poll() is None, self.said
            return file.exists()

        eventually(is_written, "the stack runs", every_s=0.2)
        show = f"set -a; . {file}; {sys.executable} -c 'import json, os; "
        show += "print(json.dumps(dict(os.environ)))'"
        shell = subprocess.run(["sh", "-c", show], capture_output=True, text=True, check=True)
        return json.loads(shell.stdout)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user can reach too; pytest's own are closed."""
    try:
        find_programs()
    except ServiceError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))
    folder = Path(tempfile.mkdtemp(prefix="nsa-stack-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.cluster
def test_pretrain_sft_generate_on_a_stack_that_is_started_twice(
    open_folder: Path,
    tiny_shards: Any,
    tiny_chat_shards: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    first = RunningStack(open_folder / "stack")
    try:
        use(first.environment, monkeypatch)
        assert "export AWS_SECRET_ACCESS_KEY=" in first.said
        with urllib.request.urlopen(f"{first.environment['MLFLOW_TRACKING_URI']}/health") as answer:
            assert answer.read() == b"OK"
        assert listening_elsewhere(first.process.pid) == []
        assert submit.main(pretraining(tiny_shards, first.environment)) == 0, capfd.readouterr().err
        said = capfd.readouterr().out
        assert "step 4/4" in said and "SUCCEEDED" in said
        assert f"Dashboard  {first.environment['RAY_API_SERVER_ADDRESS']}/#/jobs/" in said
        # MLflow has no folder of its own for artifacts: what is registered lies on S3.
        names = [Path(entry.name).name for entry in storage.walk("s3://nsa/mlflow")]
        assert "model.safetensors" in names
        assert storage.exists("s3://nsa/runs/smoke/model/model.safetensors")
        assert submit.main(tuning(tiny_chat_shards, first.environment)) == 0, capfd.readouterr().err
        assert storage.exists("s3://nsa/runs/smoke-sft/model/model.safetensors")
        capfd.readouterr()
        nothing = ["--set", f"data.path={tmp_path}/nothing", "--set", "name=fails"]
        assert submit.main([*pretraining(tiny_shards, first.environment), *nothing]) == 1
        said = capfd.readouterr().out
        assert f"{tmp_path}/nothing" in said and "FAILED" in said
        with pytest.raises(SystemExit) as again:
            stack.main(["--folder", str(first.folder), *ANY_PORTS])
        assert again.value.code == 2
        said = capfd.readouterr().err
        assert f"a stack runs there already, process {first.process.pid}" in said
    finally:
        left = first.end(signal.SIGTERM)
    assert left == [] and first.process.returncode == 0
    assert "stopped; the data are in" in first.said
    assert not (first.folder / "environment.sh").exists()

    second = RunningStack(open_folder / "stack")
    try:
        use(second.environment, monkeypatch)
        generated = subprocess.run(
            [sys.executable, "-m", "jobs.generate", *generation(tmp_path, second.environment)],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert generated.returncode == 0, generated.stderr
        lines = storage.read_text("s3://nsa/generated/results.jsonl").splitlines()
        assert [json.loads(line)["completion_tokens"] for line in lines] == [5, 5]
    finally:
        left = second.end(signal.SIGINT)
    assert left == [] and second.process.returncode == 0


def use(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        if name.startswith(("AWS_", "RAY_", "MLFLOW_")):
            monkeypatch.setenv(name, value)


def settings(changes: dict[str, Any]) -> list[str]:
    return [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]


def training(shards: Any, environment: dict[str, str]) -> dict[str, Any]:
    return {
        "data.path": shards.path,
        "train.steps": 4,
        "train.validate_every_steps": 4,
        "storage": "s3://nsa/runs",
        "tracking.uri": environment["MLFLOW_TRACKING_URI"],
        "tracking.registered_model": "stacked",
    }


def pretraining(shards: Any, environment: dict[str, str]) -> list[str]:
    changes = training(shards, environment) | {"model.vocab_size": 512}
    return ["pretrain", "--config", "jobs/configs/pretrain/smoke.yaml", *settings(changes)]


def tuning(shards: Any, environment: dict[str, str]) -> list[str]:
    changes = training(shards, environment) | {"checkpoint": "models:/stacked@champion"}
    return ["sft", "--config", "jobs/configs/sft/smoke.yaml", *settings(changes)]


def generation(folder: Path, environment: dict[str, str]) -> list[str]:
    (folder / "rows.jsonl").write_text('{"prompt": "import os"}\n{"prompt": "def main("}\n')
    changes = {
        "checkpoint": "models:/stacked@champion",
        "inputs": f"[{folder}/rows.jsonl]",
        "output": "s3://nsa/generated",
        "sampling": "{max_tokens: 5, ignore_eos: true}",
        "tracking_uri": environment["MLFLOW_TRACKING_URI"],
    }
    return ["--config", "jobs/configs/generate/smoke.yaml", *settings(changes)]


def listening_elsewhere(pid: int) -> list[Any]:
    """Listeners of the stack that another machine could reach."""
    found: list[Any] = []
    for process in family_of(pid):
        # Some live only for a moment.
        with suppress(psutil.NoSuchProcess):
            found += [
                (process.name(), connection.laddr)
                for connection in process.net_connections(kind="inet")
                if connection.status == psutil.CONN_LISTEN
            ]
    assert len(found) > 8
    return [(name, address) for name, address in found if not address.ip.endswith("127.0.0.1")]


def test_a_taken_port_is_named_and_nothing_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as end:
            ports = ["--dashboard-port=0", "--s3-port=0", f"--mlflow-port={port}"]
            stack.main(["--folder", str(tmp_path / "stack"), *ports])
    assert end.value.code == 2
    assert f"--mlflow-port: port {port} is taken" in capsys.readouterr().err
    assert not (tmp_path / "stack").exists()


def test_without_postgres_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("jobs.postgres.DEBIAN_FOLDER", Path("/nowhere"))
    with pytest.raises(ServiceError, match=r"PostgreSQL is not installed .*apt-get install"):
        find_programs()


def script(tmp_path: Path, code: str) -> Service:
    return Service(
        name="Script",
        command=[sys.executable, "-c", code],
        log=tmp_path / "logs" / "script.log",
        is_healthy=lambda: (tmp_path / "ready").exists(),
        stop_patience_s=0.5,
    )


def test_a_service_that_ends_says_what_its_log_says(tmp_path: Path) -> None:
    service = script(tmp_path, "print('no such database'); raise SystemExit(3)")
    service.start()
    with pytest.raises(
        ServiceError, match=r"(?s)Script has ended with status 3:.*no such database"
    ):
        service.wait_until_healthy()
    service.stop()
    missing = script(tmp_path, "")
    missing.command = ["/nowhere/program"]
    with pytest.raises(ServiceError, match="Script: /nowhere/program: No such file"):
        missing.start()


def test_a_service_that_heeds_nothing_is_killed_with_its_children(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    child = f"{deaf} open({str(tmp_path / 'ready')!r}, 'w'); time.sleep(100)"
    parent = f"import subprocess, sys; {deaf} subprocess.run([sys.executable, '-c', {child!r}])"
    service = script(tmp_path, parent)
    service.start()
    service.wait_until_healthy()
    assert service.process is not None
    family = family_of(service.process.pid)
    assert len(family) == 2
    service.stop()
    assert not any(map(is_alive, family))
    end_all(family)
