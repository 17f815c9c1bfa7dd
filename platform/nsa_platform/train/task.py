"""What a training worker is told and what it answers.

Ray Train's controller unpickles both, so this file must stay light to import.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from nsa_platform.config.model import ModelConfig
from nsa_platform.config.stages import Stage


class Events(Protocol):
    """Where workers tell the driver how it goes; Ray's Queue is one."""

    def put_nowait(self, item: dict[str, Any]) -> None:
        """Hand over one event without waiting for its reader."""


@dataclass(frozen=True, slots=True)
class Task:
    """Everything a worker needs to know. All places in it are absolute."""

    model: ModelConfig
    """As the run begins with it."""
    stages: tuple[Stage, ...]
    cpus: int
    folder: str
    """The run's own, local or s3://."""
    start_from: str | None
    """Exported model whose weights a new run begins with, local or s3://; None: from scratch."""
    cache_dir: str
    """Local folder for copies of remote files."""
    has_validation: tuple[bool, ...]
    """Whether there are held-out rows, of each stage."""
    described: tuple[dict[str, Any], ...]
    """What a checkpoint of each stage keeps of the configuration."""
    handle: dict[str, Any]
    """Of the MLflow run, as RunHandle.to_dict gives it."""
    identity: dict[str, Any]
    """What every checkpoint says about its run."""
    events: Events | None
    """Where the first worker tells the driver how it goes; None: nowhere."""

    @property
    def steps(self) -> int:
        """Of all stages."""
        return self.stages[-1].last_step

    def stage_at(self, step: int) -> Stage:
        """The stage of the next step when `step` are done; the last one when all are."""
        return next((each for each in self.stages if step < each.last_step), self.stages[-1])


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
