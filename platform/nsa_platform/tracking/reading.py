"""What a finished or running MLflow run holds, as plain values."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_platform.tracking import library
from nsa_platform.tracking.handle import absolute_uri
from nsa_platform.tracking.store import connect


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Parameters, tags and every point of every metric of one run."""

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, list[tuple[int, float]]]
    """Points as (step, value), steps ascending."""


def read_run(uri: str, run_id: str) -> RunRecord:
    """Read one run from a tracking store, system metrics left out.

    Raises:
        TrackingError: a SQLite store does not exist.
        MlflowException: the store has no such run, or does not answer.
    """
    client = connect(absolute_uri(uri))
    run = client.get_run(run_id)
    names = [name for name in run.data.metrics if not name.startswith("system/")]
    return RunRecord(
        run_id=run_id,
        name=run.info.run_name or run_id,
        status=run.info.status,
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        metrics={
            name: sorted((p.step, p.value) for p in client.get_metric_history(run_id, name))
            for name in names
        },
    )


def read_json(uri: str, run_id: str, path: str) -> Any:
    """What a JSON artifact of a run holds.

    Raises:
        OSError: a SQLite store does not exist, or the file cannot be read.
        MlflowException: the store has no such run or artifact, or does not answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        copied = library.download_artifacts(
            run_id=run_id, artifact_path=path, dst_path=folder, tracking_uri=absolute_uri(uri)
        )
        return json.loads(Path(copied).read_text(encoding="utf-8"))
