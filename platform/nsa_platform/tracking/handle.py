"""Which MLflow run a job records into: a small value that travels to every worker."""

import dataclasses
import getpass
import hashlib
import json
import os
import subprocess
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

SQLITE = "sqlite:///"
MEMORY_FILE = "run.json"


@dataclasses.dataclass(frozen=True, slots=True)
class RunHandle:
    """One run of one store. Plain and picklable: the driver makes it, workers attach by it."""

    uri: str
    """Tracking store; a SQLite path in it is absolute, so that it means the same everywhere."""
    experiment: str
    artifacts: str | None
    """Where a new experiment keeps its artifacts; None: the server decides."""
    name: str
    key: str
    """Names the run before the store has given it an id; kept as the tag nsa.run_key."""
    started_s: float
    """When the run was first opened, in seconds since 1970."""
    queue_dir: str
    """Local folder for what has not been delivered yet."""
    run_id: str | None = None
    """The store's id; None while the store could not be reached."""
    parent: str | None = None
    """Name of the run of the same experiment below which this one stands; None: of none."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        return cls(**tree)


def absolute_uri(uri: str) -> str:
    """`uri` with a relative SQLite path made absolute by this process's working directory."""
    if not uri.startswith(SQLITE):
        return uri
    return SQLITE + str(Path(uri.removeprefix(SQLITE)).expanduser().resolve())


def artifact_root(uri: str, artifacts: str | None) -> str | None:
    """Where a new experiment of the store at the absolute `uri` keeps artifacts.

    A SQLite store keeps them in `mlartifacts` beside the database unless `artifacts` says
    otherwise; a server decides for itself unless `artifacts` is given.
    """
    if artifacts is None:
        if not uri.startswith(SQLITE):
            return None
        return str(Path(uri.removeprefix(SQLITE)).parent / "mlartifacts")
    return artifacts if "://" in artifacts else str(Path(artifacts).expanduser().resolve())


def new_handle(
    uri: str,
    experiment: str,
    *,
    artifacts: str | None,
    name: str,
    queue_dir: Path,
    parent: str | None = None,
) -> RunHandle:
    """A handle for a run that no store knows yet."""
    return RunHandle(
        uri=uri,
        experiment=experiment,
        artifacts=artifacts,
        name=name,
        key=uuid.uuid4().hex,
        started_s=time.time(),
        queue_dir=str(queue_dir.expanduser().resolve()),
        parent=parent,
    )


def parent_handle(handle: RunHandle) -> RunHandle | None:
    """The run below which a run stands: one for each name in an experiment, whoever asks first."""
    if handle.parent is None:
        return None
    key = text_digest(f"parent {handle.parent}")
    return dataclasses.replace(handle, name=handle.parent, key=key, run_id=None, parent=None)


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """What is kept beside the queue, so that a restart continues the run."""

    handle: RunHandle
    config_digest: str
    attempts: int
    """How often the run was opened."""
    unfinished: bool

    def write(self) -> None:
        path = Path(self.handle.queue_dir) / MEMORY_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
        temporary.replace(path)


def recall(queue_dir: Path) -> Memory | None:
    """What was written last in a queue folder; None if nothing was, or it cannot be read."""
    try:
        tree = json.loads((queue_dir / MEMORY_FILE).read_text(encoding="utf-8"))
        return Memory(**{**tree, "handle": RunHandle.from_dict(tree["handle"])})
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted parameters with text values, as MLflow takes them."""
    flat: dict[str, str] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{key}."))
        else:
            flat[key] = str(value)[:6000]
    return flat


def text_digest(text: str) -> str:
    """Twelve hex digits of a text's sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def origin_tags(job: str, yaml_text: str) -> dict[str, str]:
    """Where a run comes from: job, user, configuration fingerprint, git commit if there is one."""
    tags = {
        "nsa.job": job,
        "nsa.config_fingerprint": text_digest(yaml_text),
        "mlflow.source.name": f"jobs.{job}",
        "mlflow.source.type": "JOB",
        "mlflow.user": _user(),
    }
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
        tags["mlflow.source.git.branch"] = _git("rev-parse", "--abbrev-ref", "HEAD")
        tags["mlflow.source.git.dirty"] = str(bool(_git("status", "--porcelain"))).lower()
    return tags


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # A container's user may have no name.
        return str(os.getuid())


def _git(*arguments: str) -> str:
    """Output of git in the working directory; empty outside a git tree or without git."""
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
