"""One Ray Serve instance on a cluster of its own, driven as its users drive it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx2
import psutil
import yaml
from openai import OpenAI

from jobs.ports import free_ports
from tests.waiting import PATIENCE_S, eventually

ROOT = Path(__file__).resolve().parents[2]
MODEL_ID = "tiny"


@dataclass
class Serving:
    """A running cluster with the application on it."""

    http_port: int
    dashboard: str
    exporter_port: int
    """Where the node's Ray metrics are."""
    head: "subprocess.Popen[bytes]"
    environment: dict[str, str]
    folder: Path
    tree: dict[str, Any] = field(default_factory=dict)
    """The configuration that was deployed last."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @cached_property
    def client(self) -> OpenAI:
        address = f"{self.address}/v1"
        return OpenAI(base_url=address, api_key="none", max_retries=0, timeout=PATIENCE_S)

    @contextmanager
    def connection(self, path: str, body: dict[str, Any]) -> Iterator[None]:
        """A request whose answer nobody reads; the connection is closed with the block."""
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", self.http_port)) as line:
            line.sendall(head.encode() + content)
            yield

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """A command as a user of the cluster types it."""
        return subprocess.run(
            [str(Path(sys.executable).parent / command[0]), *command[1:]],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def deploy(self, **deployment_config: Any) -> None:
        """Deploy the model with other options of Ray Serve; returns before it is done."""
        self.config["deployment_config"].update(deployment_config)
        address = f"{self.dashboard}/api/serve/applications/"
        reply = httpx2.put(address, json=self.tree, timeout=PATIENCE_S)
        assert reply.status_code == 200, reply.text

    @property
    def config(self) -> dict[str, Any]:
        return self.tree["applications"][0]["args"]["llm_configs"][0]

    def application(self) -> dict[str, Any]:
        """What `serve status` knows of the application."""
        reply = httpx2.get(f"{self.dashboard}/api/serve/applications/", timeout=PATIENCE_S)
        return reply.json()["applications"].get("llm", {})

    def wait_until_running(self) -> None:
        eventually(lambda: self.application().get("status") == "RUNNING", "the application runs")

    def replicas(self) -> set[str]:
        """Names of the engines that report metrics."""
        return set(re.findall(r'nsa:kv_pages_used\{engine="(\w+)"', self.metrics()))

    def metrics(self) -> str:
        return httpx2.get(f"{self.address}/metrics", timeout=PATIENCE_S).text

    def metric(self, name: str) -> float:
        """A metric, summed over replicas."""
        values = re.findall(
            rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", self.metrics(), re.MULTILINE
        )
        assert values, f"there is no {name}"
        return sum(float(value) for value in values)

    def exported(self) -> str:
        """What Ray's exporter shows of this node."""
        return httpx2.get(f"http://127.0.0.1:{self.exporter_port}/metrics", timeout=PATIENCE_S).text

    def kill_replica(self) -> None:
        """kill -9 of a process that holds the model."""
        self.kill("ServeReplica:llm:LLMServer")

    def kill(self, title: str) -> None:
        """kill -9 of a process of the cluster with this in its title."""
        children = psutil.Process(self.head.pid).children(recursive=True)
        held = [child for child in children if title in _title(child)]
        assert held, f"no process is {title}"
        os.kill(held[0].pid, signal.SIGKILL)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextmanager
def serving(model: Path, folder: Path) -> Iterator[Serving]:
    """`ray start --head` and `serve deploy`; ends with everything that it started."""
    dashboard, gcs, agent, http, exporter = free_ports(5)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        # There is no other node to which replicas could move when the cluster is stopped.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        # Replicas run what these tests are about, wherever the package was installed from.
        "PYTHONPATH": os.pathsep.join(str(ROOT / each) for each in (".", "platform", "kernels")),
        "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    }
    environment["RAY_ADDRESS"] = f"127.0.0.1:{gcs}"
    # Short, for its sockets' paths must be.
    temporary = tempfile.mkdtemp(prefix="nsa-ray-")
    with (folder / "ray.log").open("wb") as log:
        head = subprocess.Popen(
            ["ray", "start", "--head", "--block", "--num-cpus=4", f"--port={gcs}",
             "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
             # Fixed otherwise, and taken if another cluster runs on this machine.
             f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={exporter}",
             # The clusters of other tests find themselves by what lies in the usual folder.
             f"--temp-dir={temporary}"],
            env={name: value for name, value in environment.items() if name != "RAY_ADDRESS"},
            cwd=folder,
            stdout=log,
            stderr=log,
        )  # fmt: skip
        try:
            running = Serving(
                http, f"http://127.0.0.1:{dashboard}", exporter, head, environment, folder
            )
            eventually(lambda: _answers(running.dashboard), "the dashboard answers")
            _deploy(running, model)
            yield running
            running.client.close()
        finally:
            _stop(head)
            shutil.rmtree(temporary, ignore_errors=True)


def _stop(head: "subprocess.Popen[bytes]") -> None:
    """End the cluster without waiting for replicas to finish gracefully."""
    started = psutil.Process(head.pid).children(recursive=True)
    head.terminate()
    psutil.wait_procs(started, timeout=3)
    for process in started:
        if process.is_running():
            process.kill()
    head.wait(PATIENCE_S)


def _answers(address: str) -> bool:
    try:
        reply = httpx2.get(f"{address}/api/serve/applications/", timeout=5)
        return reply.status_code == 200
    except httpx2.HTTPError:
        return False


def _deploy(running: Serving, model: Path) -> None:
    running.tree = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": running.http_port},
        "applications": [
            {
                "name": "llm",
                "route_prefix": "/",
                "import_path": "deployments.llm:build_openai_app",
                "args": {
                    "llm_configs": [
                        {
                            "model_loading_config": {
                                "model_id": MODEL_ID,
                                "model_source": str(model),
                            },
                            "engine_kwargs": {"max_num_seqs": 8, "max_num_batched_tokens": 512},
                            "deployment_config": {
                                "num_replicas": 1,
                                "max_ongoing_requests": 24,
                                "max_queued_requests": 24,
                                "health_check_period_s": 1,
                                "graceful_shutdown_wait_loop_s": 0.5,
                                "ray_actor_options": {"num_cpus": 0.2},
                            },
                        }
                    ]
                },
            }
        ],
    }
    path = running.folder / "serve.yaml"
    path.write_text(yaml.safe_dump(running.tree))
    done = running.run("serve", "deploy", str(path))
    assert done.returncode == 0, done.stderr
    running.wait_until_running()
