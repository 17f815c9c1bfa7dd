"""Submission: what is sent and what is refused; test_stack.py submits to a real cluster."""

import asyncio
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from aiohttp import web

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


@contextmanager
def vanishing_dashboard() -> Iterator[str]:
    """Takes a job and drops the connection, says at the second try that it has it, sends a line of
    its log and is gone; what Ray's own client then says is real."""
    loop, gone = asyncio.new_event_loop(), asyncio.Event()
    taken: list[str] = []

    async def version(request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": ray.__version__, "ray_commit": ""})

    async def package(request: web.Request) -> web.Response:
        return web.Response()

    async def take(request: web.Request) -> web.Response:
        job_id = (await request.json())["submission_id"]
        if job_id in taken:
            text = f"ValueError: Job with submission_id {job_id} already exists. Use another."
            return web.Response(status=500, text=text)
        taken.append(job_id)
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def tail(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str("step 1\n")
        assert request.transport is not None
        request.transport.abort()
        gone.set()
        return socket

    async def serve(ready: list[str], is_up: threading.Event) -> None:
        app = web.Application()
        app.router.add_get("/api/version", version)
        app.router.add_get("/api/packages/{name:.*}", package)
        app.router.add_post("/api/jobs/", take)
        app.router.add_get("/api/jobs/{name}/logs/tail", tail)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ready.append(runner.addresses[0][1])
        is_up.set()
        await gone.wait()
        await runner.cleanup()

    ready, is_up = [], threading.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=[serve(ready, is_up)])
    thread.start()
    is_up.wait()
    yield f"http://127.0.0.1:{ready[0]}"
    loop.call_soon_threadsafe(gone.set)
    thread.join()
    loop.close()


# Of Ray's client.
@pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")
def test_a_cluster_that_goes_away_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with vanishing_dashboard() as address:
        with pytest.raises(SystemExit) as caught:
            main(["pretrain", "--config", CONFIG, "--address", address])
    assert caught.value.code == 1
    said = capsys.readouterr()
    assert "step 1\n" in said.out
    assert said.out.count("The cluster is not ready, waiting up to 60 s\n") == 1
    last = said.err.splitlines()[-1]
    assert re.match(rf"error: {address} went away while job raysubmit_\w{{16}} ran \(", last)
    assert "the same command goes on" in last and "Traceback" not in said.err
