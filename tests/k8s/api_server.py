"""A Kubernetes API server on loopback, as far as kubectl needs one to create and follow a RayJob.

The client is the real kubectl; what is played is the cluster: each look at a RayJob moves it on
through a script of states, and its submitter's log is text. Objects are judged as the API server
judges them, by the CRD's schema, if one is given.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

Tree = dict[str, Any]
RAYJOBS = "/apis/ray.io/v1/namespaces/{namespace}/rayjobs"

DISCOVERY: dict[str, Tree] = {
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {
        "kind": "APIGroupList",
        "apiVersion": "v1",
        "groups": [
            {
                "name": name,
                "versions": [{"groupVersion": f"{name}/v1", "version": "v1"}],
                "preferredVersion": {"groupVersion": f"{name}/v1", "version": "v1"},
            }
            for name in ("batch", "ray.io")
        ],
    },
}


def _resources(group_version: str, *kinds: tuple[str, str]) -> Tree:
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": group_version,
        "resources": [
            {
                "name": name,
                "singularName": kind.lower(),
                "namespaced": True,
                "kind": kind,
                "verbs": ["create", "get", "list", "delete"],
            }
            for name, kind in kinds
        ],
    }


# That the server checks fields itself: kubectl asks before it sends an object.
DISCOVERY["/openapi/v3"] = {
    "paths": {"apis/ray.io/v1": {"serverRelativeURL": "/openapi/v3/apis/ray.io/v1"}}
}
DISCOVERY["/openapi/v3/apis/ray.io/v1"] = {
    "openapi": "3.0.0",
    "info": {"title": "Kubernetes", "version": "v1"},
    "paths": {
        RAYJOBS + "/{name}": {
            "patch": {
                "x-kubernetes-group-version-kind": {
                    "group": "ray.io",
                    "version": "v1",
                    "kind": "RayJob",
                },
                "parameters": [{"name": "fieldValidation", "in": "query"}],
                "responses": {"200": {"description": "OK"}},
            }
        }
    },
}
DISCOVERY["/api/v1"] = _resources("v1", ("pods", "Pod"))
DISCOVERY["/apis/batch/v1"] = _resources("batch/v1", ("jobs", "Job"))
DISCOVERY["/apis/ray.io/v1"] = _resources("ray.io/v1", ("rayjobs", "RayJob"))


@dataclass
class Cluster:
    """What the server plays."""

    states: list[Tree]
    """Statuses of the RayJob, one for each look at it; the last stays."""
    log: str = "step 10/10\n"
    judge: Callable[[Tree], list[str]] | None = None
    """Problems of an object that is to be created."""
    taken: list[Tree] = field(default_factory=list)
    """What has been created."""
    address: str = ""

    def kubeconfig(self, path: Path) -> Path:
        """Write a kubeconfig for this cluster."""
        server = {"name": "c", "cluster": {"server": self.address}}
        context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "c",
                    "clusters": [server],
                    "contexts": [context],
                    "users": [{"name": "u", "user": {}}],
                }
            )
        )
        return path

    def answer(self, path: str) -> tuple[int, Tree | str]:
        """The answer to a GET."""
        if path in DISCOVERY:
            return 200, DISCOVERY[path]
        if path.endswith("/log"):
            return 200, self.log
        name = path.rsplit("/", 1)[1]
        labels = {"job-name": name}
        if "/rayjobs/" in path:
            found = [each for each in self.taken if each["metadata"]["name"] == name]
            if not found:
                return _failure(404, "NotFound", f'rayjobs.ray.io "{name}" not found')
            status = self.states.pop(0) if len(self.states) > 1 else self.states[0]
            return 200, {**found[0], "status": status}
        if "/jobs/" in path:
            return 200, {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {"name": name, "namespace": "nsa"},
                "spec": {"selector": {"matchLabels": labels}},
            }
        container = {"name": "ray-job-submitter", "image": "i"}
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "submitter", "namespace": "nsa"},
            "spec": {"containers": [container]},
            "status": {"phase": "Running"},
        }
        if name == "pods":
            return 200, {"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": [pod]}
        if name == "submitter":
            return 200, pod
        return _failure(404, "NotFound", f"nothing at {path}")

    def create(self, tree: Tree) -> tuple[int, Tree]:
        """The answer to a POST of a RayJob."""
        name = tree["metadata"]["name"]
        if any(each["metadata"]["name"] == name for each in self.taken):
            return _failure(409, "AlreadyExists", f'rayjobs.ray.io "{name}" already exists')
        problems = self.judge(tree) if self.judge else []
        if problems:
            return _failure(400, "BadRequest", "; ".join(problems))
        self.taken.append(tree)
        return 201, tree


def _failure(code: int, reason: str, message: str) -> tuple[int, Tree]:
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
    return code, {**body, "message": message, "reason": reason, "code": code}


@contextmanager
def serving(cluster: Cluster) -> Iterator[Cluster]:
    """Serve the cluster on a free loopback port inside the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(*cluster.answer(self.path.split("?")[0]))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self._send(*cluster.create(json.loads(body)))

        def _send(self, code: int, answer: Tree | str) -> None:
            text = answer if isinstance(answer, str) else json.dumps(answer)
            self.send_response(code)
            kind = "text/plain" if isinstance(answer, str) else "application/json"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    cluster.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
