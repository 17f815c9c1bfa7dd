"""Hand a run's RayJob to a Kubernetes cluster with kubectl, and follow it to its end."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.cli import EXIT_BAD_CONFIG, EXIT_INTERRUPTED, fail
from jobs.manifest_yaml import to_yaml
from jobs.rayjob import render_job
from nsa_platform.config.base import ConfigError

DEFAULT_NAMESPACE = "nsa"
ENDED = ("Complete", "Failed", "ValidationFailed")
POLL_S = 2.0
# A cluster's API may be away for a while; the job does not mind.
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Kubectl:
    """kubectl in one namespace."""

    namespace: str

    def line(self, *words: str) -> list[str]:
        return ["kubectl", "--namespace", self.namespace, *words]

    def run(self, *words: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run it to its end; nothing is raised if it fails."""
        return subprocess.run(
            self.line("--request-timeout=30s", *words),
            input=given,
            capture_output=True,
            text=True,
            check=False,
        )


def submit(
    job: str,
    config: str,
    overrides: Sequence[str],
    *,
    namespace: str,
    image: str | None,
    dry_run: bool,
    wait: bool,
) -> int:
    """Render the RayJob; print it, or create it and follow it.

    Returns 0 if the job succeeded (or was created, without `wait`), 1 if not. Ends the process
    with status 2 if the configuration is wrong or there is no kubectl or no cluster for it; then
    nothing has been created. The RayJob is one object: it is there whole or not at all.
    """
    try:
        tree, _ = render_job(job, config, overrides, namespace=namespace, image=image)
    except ConfigError as error:
        fail(str(error), status=EXIT_BAD_CONFIG)
    by_hand = f"{_own_line(job, config, overrides, namespace, image)} | kubectl create --filename -"
    if dry_run:
        print(f"# The same by hand: {by_hand}\n{to_yaml(tree)}", end="")
        return 0
    print(f"The same by hand: {by_hand}")
    kubectl = Kubectl(namespace)
    _require_cluster()
    name = tree["metadata"]["name"]
    created = kubectl.run("create", "--filename", "-", given=to_yaml(tree))
    if created.returncode != 0:
        fail(_refusal(created.stderr, kubectl, name))
    print(f"RayJob     {name} in namespace {namespace}")
    print(f"Dashboard  {shlex.join(kubectl.line('get', 'rayjob', name))}  # names its address")
    print(f"MLflow     {shlex.join(kubectl.line('port-forward', 'service/mlflow', '5000'))}")
    print(f"Stop it    {shlex.join(kubectl.line('delete', 'rayjob', name))}", flush=True)
    if not wait:
        print(f"Follow it  {shlex.join(kubectl.line('logs', '--follow', f'job/{name}'))}")
        return 0
    try:
        return follow(kubectl, name)
    except KeyboardInterrupt:
        print("\nThe job goes on.")
        return EXIT_INTERRUPTED


def follow(kubectl: Kubectl, name: str) -> int:
    """Print a RayJob's states and its logs until it has ended; 0 if it succeeded, else 1."""
    said = streamed = None
    while True:
        status = _status(kubectl, name)
        state = status.get("jobDeploymentStatus") or "Waiting for the operator"
        job_state = status.get("jobStatus") or ""
        attempt = status.get("jobId")
        if (line := f"{state} {job_state}".strip()) != said:
            print(f"Job {name}: {line}", flush=True)
            said = line
        ended = state in ENDED
        if attempt and attempt != streamed and (ended or job_state == "RUNNING"):
            streamed = attempt if _stream(kubectl, name, follow_it=not ended) else None
        if ended:
            break
        time.sleep(POLL_S)
    if job_state == "SUCCEEDED":
        return 0
    reasons = [status[key] for key in ("reason", "message") if status.get(key)]
    print(f"error: {': '.join(reasons) or state}", file=sys.stderr)
    return 1


def _status(kubectl: Kubectl, name: str) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        answer = kubectl.run("get", "rayjob", name, "--output", "json")
        if answer.returncode == 0:
            return json.loads(answer.stdout).get("status") or {}
        if "NotFound" in answer.stderr:
            fail(f"RayJob {name} has been deleted")
        if time.monotonic() > deadline:
            fail(f"lost sight of RayJob {name}, which goes on: {_last_line(answer.stderr)}")
        time.sleep(POLL_S)


def _stream(kubectl: Kubectl, name: str, *, follow_it: bool) -> bool:
    """Print the log of the attempt; False if its pod has none yet."""
    flags = ["--follow"] if follow_it else []
    words = kubectl.line("logs", *flags, "--container=ray-job-submitter", f"job/{name}")
    return subprocess.run(words, stderr=subprocess.DEVNULL, check=False).returncode == 0


def _require_cluster() -> None:
    if shutil.which("kubectl") is None:
        fail("kubectl is not on PATH; nothing was submitted", status=EXIT_BAD_CONFIG)
    # Inside a pod kubectl finds its cluster without a kubeconfig.
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return
    context = subprocess.run(
        ["kubectl", "config", "current-context"], capture_output=True, text=True, check=False
    )
    if context.returncode != 0 or not context.stdout.strip():
        fail(
            "kubectl knows no cluster: set KUBECONFIG to a kubeconfig with a current context "
            "(kubectl config get-contexts); nothing was submitted",
            status=EXIT_BAD_CONFIG,
        )


def _refusal(stderr: str, kubectl: Kubectl, name: str) -> str:
    reason = f"the cluster did not take RayJob {name}: {_last_line(stderr)}"
    if "AlreadyExists" in stderr:
        delete = shlex.join(kubectl.line("delete", "rayjob", name))
        return f"{reason}; after `{delete}` the same command goes on from the newest checkpoint"
    if "no matches for kind" in stderr:
        return f"{reason}; is KubeRay installed? See k8s/README.md"
    return reason


def _own_line(
    job: str, config: str, overrides: Sequence[str], namespace: str, image: str | None
) -> str:
    words = ["python", "-m", "jobs.submit", job, "--config", config, "--k8s", "--dry-run"]
    for override in overrides:
        words += ["--set", override]
    if namespace != DEFAULT_NAMESPACE:
        words += ["--namespace", namespace]
    if image is not None:
        words += ["--image", image]
    return shlex.join(words)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no reason given"
