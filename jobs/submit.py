"""Submit a job to a Ray cluster or to Kubernetes, from the YAML file of a local run.

    python -m jobs.submit pretrain --config jobs/configs/pretrain/smoke.yaml
    python -m jobs.submit sft --config ... --set train.steps=100 --no-wait
    python -m jobs.submit pretrain --config ... --set storage=s3://... --k8s --dry-run

The configuration is validated here, before the cluster hears of it. The repository travels as the
job's working directory and its two packages as py_modules, so that the cluster needs nothing but
the dependencies. Prints the `ray job submit` line that does the same, and streams the logs.

With --k8s the run becomes a RayJob, a cluster of its own from an image that holds the code, and
travels inside it; --dry-run prints it, otherwise kubectl creates it and its logs are streamed.

Exit status: 0 the job succeeded (or was accepted, with --no-wait); 1 it failed or the cluster
could not be reached or went away; 2 the configuration is wrong, or kubectl or its cluster is
missing (nothing was submitted).
"""

import argparse
import asyncio
import ipaddress
import json
import os
import secrets
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import requests
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs import submit_kubernetes
from jobs.cli import EXIT_BAD_CONFIG, describe_run, fail
from jobs.rayjob import JOBS, refuse_relative, relative_places
from nsa_platform.config.base import ConfigError, Strict
from nsa_platform.config.locations import absolute

ROOT = Path(__file__).resolve().parents[1]
START_PATIENCE_S = 60
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# In gitignore's words, and for the packages too; what .gitignore names stays here as well.
NOT_SHIPPED = [".[a-z]*", "__pycache__"]
# Settings of the submitting shell that the job needs to reach storage and tracking. Values travel
# with the job; secrets on a shared cluster belong into the cluster's own environment instead.
FORWARDED = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "MLFLOW_TRACKING_URI", "RAY_AUTH_MODE")


@dataclass(frozen=True)
class Submission:
    """What is sent: the command, its environment, and where to."""

    address: str
    entrypoint: str
    runtime_env: dict[str, Any]

    def command_line(self) -> str:
        """The `ray job submit` line that does the same from the repository's root."""
        environment = {**self.runtime_env, "working_dir": "."}
        environment["py_modules"] = [
            str(Path(module).relative_to(ROOT)) for module in self.runtime_env["py_modules"]
        ]
        return (
            f"ray job submit --address {self.address} --working-dir . "
            f"--runtime-env-json {shlex.quote(json.dumps(environment))} -- {self.entrypoint}"
        )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", choices=sorted(JOBS), help="which entry point")
    parser.add_argument("--config", required=True, metavar="X.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", dest="overrides")
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent and stop")
    parser.add_argument(
        "--address",
        help=f"dashboard of the cluster (default: RAY_API_SERVER_ADDRESS or {DEFAULT_ADDRESS})",
    )
    parser.add_argument("--no-wait", action="store_true", help="do not stream logs")
    parser.add_argument("--k8s", action="store_true", help="make it a RayJob on Kubernetes")
    parser.add_argument(
        "--namespace", help=f"with --k8s (default: {submit_kubernetes.DEFAULT_NAMESPACE})"
    )
    parser.add_argument("--image", help="with --k8s (default: that of k8s/rayjob.yaml)")
    options = parser.parse_args(argv)
    if options.k8s and options.address:
        parser.error("--address is of a Ray cluster; --k8s makes one for the job")
    if not options.k8s and (options.namespace or options.image):
        parser.error("--namespace and --image go with --k8s")
    options.address = options.address or os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS)
    options.namespace = options.namespace or submit_kubernetes.DEFAULT_NAMESPACE
    return options


def build(
    job: str, config: str, overrides: Sequence[str], address: str
) -> tuple[Submission, Strict]:
    """Validate the run and describe its submission.

    Relative places are seen from the current folder when the cluster is on this machine. A remote
    cluster cannot see them, so there they are an error.

    Raises:
        ConfigError: the configuration is wrong, lies outside the repository, or names a relative
            place although the cluster is remote.
    """
    run = JOBS[job].load(config, overrides)
    path = Path(config).resolve()
    if not path.is_relative_to(ROOT):
        raise ConfigError(f"{config}: must lie inside the repository, which travels with the job")
    if not _is_loopback(address):
        refuse_relative(run, source=config, cluster=address)
    words = ["python", "-m", f"jobs.{job}", "--config", str(path.relative_to(ROOT))]
    for override in [*overrides, *(_absolute_override(run, key) for key in relative_places(run))]:
        words += ["--set", override]
    environment = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    runtime_env = {
        "working_dir": str(ROOT),
        "excludes": NOT_SHIPPED,
        "py_modules": [
            str(ROOT / "platform" / "nsa_platform"),
            str(ROOT / "kernels" / "nsa_kernels"),
        ],
        "env_vars": environment,
    }
    return Submission(address, shlex.join(words), runtime_env), run


def main(argv: Sequence[str] | None = None) -> int:
    """Submit, stream the logs, return the job's exit status."""
    options = arguments(argv)
    if options.k8s:
        return submit_kubernetes.submit(
            options.job,
            options.config,
            options.overrides,
            namespace=options.namespace,
            image=options.image,
            dry_run=options.dry_run,
            wait=not options.no_wait,
        )
    try:
        submission, run = build(options.job, options.config, options.overrides, options.address)
    except ConfigError as error:
        fail(str(error), status=EXIT_BAD_CONFIG)
    describe_run(run)
    print(f"The same by hand, from {ROOT}:\n  {submission.command_line()}")
    if options.dry_run:
        return 0
    try:
        client = JobSubmissionClient(options.address)
        job_id = _send(client, submission)
    except (OSError, RuntimeError) as error:
        fail(f"{options.address} did not take the job: {_reason(error)}")
    print(f"Job        {job_id}\nDashboard  {options.address}/#/jobs/{job_id}")
    print(f"MLflow     {_tracking_link(run)}", flush=True)
    if options.no_wait:
        print(f"Follow it  ray job logs --address {options.address} --follow {job_id}")
        return 0
    return _follow(client, job_id, options.address)


def _send(client: JobSubmissionClient, submission: Submission) -> str:
    """Submit; a cluster that has only just started is given time for its first agent, and may
    drop a connection until then."""
    deadline = time.monotonic() + START_PATIENCE_S
    # Chosen here, so that what is sent again is never taken twice.
    job_id, has_said_so = f"raysubmit_{secrets.token_hex(8)}", False
    while True:
        try:
            return client.submit_job(
                entrypoint=submission.entrypoint,
                runtime_env=submission.runtime_env,
                submission_id=job_id,
            )
        except (requests.ConnectionError, RuntimeError) as error:
            if f"{job_id} already exists" in str(error):
                return job_id
            is_dropped = isinstance(error, requests.ConnectionError)
            may_pass = is_dropped or "No available agent" in str(error)
            if not may_pass or time.monotonic() > deadline:
                raise
            if not has_said_so:
                print(f"The cluster is not ready, waiting up to {START_PATIENCE_S} s", flush=True)
                has_said_so = True
            time.sleep(1)


def _follow(client: JobSubmissionClient, job_id: str, address: str) -> int:
    async def stream() -> None:
        async for lines in client.tail_job_logs(job_id):
            print(lines, end="", flush=True)

    try:
        asyncio.run(stream())
        info = client.get_job_info(job_id)
    except KeyboardInterrupt:
        print(f"\nThe job goes on. Stop it: ray job stop --address {address} {job_id}")
        return 130
    except (OSError, RuntimeError) as error:
        fail(
            f"{address} went away while job {job_id} ran ({_reason(error)}). If the cluster is "
            "gone, the same command goes on from the newest checkpoint when it is back; if not, "
            f"follow the job: ray job logs --address {address} --follow {job_id}"
        )
    print(f"Job {job_id}: {info.status.value}")
    if info.status != JobStatus.SUCCEEDED:
        print(f"error: {info.message}", file=sys.stderr)
        return 1
    return 0


def _absolute_override(run: Strict, key: str) -> str:
    value: Any = run
    for part in key.split("."):
        value = getattr(value, part)
    here = Path.cwd()
    if isinstance(value, tuple):
        return f"{key}={json.dumps([absolute(each, here) for each in value])}"
    return f"{key}={absolute(value, here)}"


def _is_loopback(address: str) -> bool:
    host = urlparse(address).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _tracking_link(run: Strict) -> str:
    tracking = getattr(run, "tracking", None)
    if tracking is None:
        return "this job records no run"
    if tracking.uri.startswith("http"):
        return f"{tracking.uri} (experiment {tracking.experiment!r})"
    return f"make mlflow (experiment {tracking.experiment!r} in {tracking.uri})"


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


if __name__ == "__main__":
    raise SystemExit(main())
