"""What a training worker is told and what it answers.

Ray Train's controller unpickles both, so this file must stay light to import.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from nsa_platform.config.data import LoaderConfig
from nsa_platform.config.model import ModelConfig
from nsa_platform.config.train import TrainConfig


class Events(Protocol):
    """Where workers tell the driver how it goes; Ray's Queue is one."""

    def put_nowait(self, item: dict[str, Any]) -> None:
        """Hand over one event without waiting for its reader."""


@dataclass(frozen=True, slots=True)
class Task:
    """Everything a worker needs to know. All places in it are absolute."""

    model: ModelConfig
    data: LoaderConfig
    train: TrainConfig
    cpus: int
    folder: str
    """The run's own, local or s3://."""
    start_from: str | None
    """Exported model whose weights a new run begins with, local or s3://; None: from scratch."""
    cache_dir: str
    """Local folder for copies of remote files."""
    has_validation: bool
    handle: dict[str, Any]
    """Of the MLflow run, as RunHandle.to_dict gives it."""
    identity: dict[str, Any]
    """What every checkpoint says about its run."""
    events: Events | None
    """Where the first worker tells the driver how it goes; None: nowhere."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it went, from the first worker."""

    step: int
    device: str
    """What a worker computed on."""
    first_loss: float | None
    last_loss: float | None
    metrics: dict[str, float]
    """Of the last step that this attempt has done."""
    failed_checkpoints: list[int]
    problem: str | None
    """Why there is no finished model; None if there is one."""
