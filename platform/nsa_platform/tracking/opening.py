"""Open a job's run on the driver: a new one, or the one that an earlier attempt has begun."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsa_platform.config.train import TrackingConfig
from nsa_platform.tracking.handle import (
    SQLITE,
    Memory,
    RunHandle,
    absolute_uri,
    artifact_root,
    new_handle,
    origin_tags,
    parent_handle,
    recall,
    text_digest,
)
from nsa_platform.tracking.tracker import Tracker

SQLITE_PATIENCE_S = 120.0
"""Making a new SQLite store runs all of MLflow's migrations: seconds, more on a busy machine."""
SERVER_PATIENCE_S = 30.0


def open_run(
    config: TrackingConfig,
    *,
    job: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    yaml_text: str,
    queue_dir: Path,
    run_id: str | None = None,
    continues: bool = True,
) -> RunHandle:
    """Create or continue the run that `job` records into; its status becomes RUNNING.

    Call it once, on the driver; workers make a Tracker of the handle. It waits for the store a
    bounded time. If the store is out of reach, the handle has no run_id, one line says so, and
    whoever reaches the store first creates the run.

    Args:
        params: the configuration; nested mappings become dotted names.
        tags: what else to find the run by, such as attention kind and model size.
        yaml_text: the resolved configuration, kept as the artifact config.yaml.
        queue_dir: local folder, the run's own, for what is not delivered yet.
        run_id: continue this run (from a checkpoint). Without it, a run that an earlier attempt
            opened with the same queue_dir, store and configuration and did not finish is continued.
        continues: false for a job that starts over each time: every call is a new run.
    """
    known = recall(queue_dir) if continues else None
    digest = text_digest(yaml_text)
    memory = _choose(config, name, digest, queue_dir=queue_dir, run_id=run_id, known=known)
    memory.write()
    tracker = Tracker(memory.handle, creates_store=True)
    tracker.log_params(params)
    attempts = {"nsa.attempts": str(memory.attempts)}
    tracker.set_tags({**origin_tags(job, yaml_text), **attempts, **tags})
    tracker.set_status("RUNNING")
    earlier = "" if memory.attempts == 1 else f"-attempt-{memory.attempts}"
    tracker.log_text(yaml_text, f"config{earlier}.yaml")
    patience_s = SQLITE_PATIENCE_S if memory.handle.uri.startswith(SQLITE) else SERVER_PATIENCE_S
    tracker.finish(None, timeout_s=patience_s, report=False)
    return dataclasses.replace(memory.handle, run_id=tracker.run_id)


def attach_run(config: TrackingConfig, *, name: str, run_id: str, queue_dir: Path) -> RunHandle:
    """A handle to record into a run that exists, without touching its settings or status."""
    uri = absolute_uri(config.uri)
    handle = new_handle(uri, config.experiment, artifacts=None, name=name, queue_dir=queue_dir)
    return dataclasses.replace(handle, run_id=run_id)


def open_parent(config: TrackingConfig, *, queue_dir: Path) -> RunHandle:
    """A handle to record into the run below which runs of this configuration stand.

    Raises:
        ValueError: config.parent is not given.
    """
    uri = absolute_uri(config.uri)
    child = new_handle(
        uri,
        config.experiment,
        artifacts=artifact_root(uri, config.artifacts),
        name="",
        queue_dir=queue_dir,
        parent=config.parent,
    )
    parent = parent_handle(child)
    if parent is None:
        raise ValueError("tracking.parent names no run")
    return parent


def _choose(
    config: TrackingConfig,
    name: str,
    digest: str,
    *,
    queue_dir: Path,
    run_id: str | None,
    known: Memory | None,
) -> Memory:
    uri = absolute_uri(config.uri)
    if known is not None and (known.handle.uri, known.handle.experiment) == (
        uri,
        config.experiment,
    ):
        same_run = run_id is not None and known.handle.run_id == run_id
        begun = run_id is None and known.unfinished and known.config_digest == digest
        if same_run or begun:
            return dataclasses.replace(
                known, config_digest=digest, attempts=known.attempts + 1, unfinished=True
            )
    handle = new_handle(
        uri,
        config.experiment,
        artifacts=artifact_root(uri, config.artifacts),
        name=name,
        queue_dir=queue_dir,
        parent=config.parent,
    )
    attempts = 1 if run_id is None else 2
    handle = dataclasses.replace(handle, run_id=run_id)
    return Memory(handle=handle, config_digest=digest, attempts=attempts, unfinished=True)
