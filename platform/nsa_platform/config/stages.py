"""Stages of one run: the same weights and optimizer go through rows of other lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from nsa_platform.config.base import Strict
from nsa_platform.config.data import LoaderConfig, Sources
from nsa_platform.config.mesh import MeshConfig
from nsa_platform.config.model import ModelConfig, YarnConfig
from nsa_platform.config.train import RecomputePattern, TrainConfig


class StageConfig(Strict):
    """A stage that follows what data and train describe, or the stage before it. tokens_per_step
    and whatever else is not named here are the same in all stages."""

    steps: PositiveInt
    """Optimizer steps of this stage."""
    context_length: PositiveInt
    """Tokens of one packed row. The model's max_context grows with it."""
    yarn: YarnConfig | None = None
    """Stretches the positions from here on; null: as before."""
    rope_base: PositiveFloat | None = None
    """From here on; null: as before."""
    learning_rate: PositiveFloat | None = None
    """Peak of a schedule that begins here, shaped like train.optimizer's, and reaches to the next
    stage that has one or to the end of the run; null: the schedule that runs goes on."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Of the schedule that begins here."""
    data: Sources | None = None
    """Shards of the same tokenizer to train and validate on; null: as before. A stage begins an
    epoch in an order of its own: what an earlier one has seen may come again."""
    sequences_per_microbatch: PositiveInt = 1
    """Packed rows that one worker puts through the model at once."""
    activation_checkpointing: RecomputePattern | None = None
    """What the backward pass computes again; null: as before."""
    mesh: MeshConfig | None = None
    """What workers share; null: as before."""

    @model_validator(mode="after")
    def _warms_up_something(self) -> Self:
        if self.warmup_steps and self.learning_rate is None:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} needs the learning_rate of a schedule that "
                "begins with this stage"
            )
        return self


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a run with all that holds in it. A run without `stages` is one of these."""

    number: int
    """From 0."""
    first_step: int
    """Steps of the run that are done when it begins."""
    data: LoaderConfig
    train: TrainConfig
    """Its steps count from the start of the run to the end of the stage."""
    schedule_start: int
    """Steps of the run that are done when its learning rate's schedule begins."""
    schedule_end: int
    """The same when that schedule ends, which may be in a later stage."""
    max_context: int
    """Longest context up to here."""
    yarn: YarnConfig | None = None
    """None: the model's own."""
    rope_base: float | None = None
    """None: the model's own."""

    @property
    def last_step(self) -> int:
        """Steps of the run that are done when it ends."""
        return self.train.steps

    @property
    def key(self) -> str:
        """Where the configuration names its steps."""
        return f"stages.{self.number - 1}.steps" if self.number else "train.steps"

    def model_of(self, model: ModelConfig) -> ModelConfig:
        """The run's model as it is in this stage: no weight depends on what differs."""
        changes = {
            "max_context": max(model.max_context, self.max_context) if self.number else None,
            "yarn": self.yarn,
            "rope_base": self.rope_base,
        }
        return model.model_copy(update={k: v for k, v in changes.items() if v is not None})


def resolve_stages(
    data: LoaderConfig, train: TrainConfig, later: Sequence[StageConfig]
) -> tuple[Stage, ...]:
    """What data and train describe as the first stage, and those that follow it."""
    steps, starts = [train.steps], [0]
    for each in later:
        starts.append(starts[-1] if each.learning_rate is None else steps[-1])
        steps.append(steps[-1] + each.steps)
    # Of several stages with one schedule the last one counts.
    ends = dict(zip(starts, steps, strict=True))
    stages = [Stage(0, 0, data, train, 0, ends[0], data.context_length)]
    for config, start in zip(later, starts[1:], strict=True):
        stages.append(_after(stages[-1], config, (start, ends[start])))
    return tuple(stages)


def _after(before: Stage, config: StageConfig, schedule: tuple[int, int]) -> Stage:
    number = before.number + 1
    sources = {} if config.data is None else dict(config.data)
    # Another seed: the epoch's first documents would come again otherwise.
    rows = {"context_length": config.context_length, "seed": before.data.seed + 1}
    optimizer = before.train.optimizer
    if config.learning_rate is not None:
        schedules = {"learning_rate": config.learning_rate, "warmup_steps": config.warmup_steps}
        optimizer = optimizer.model_copy(update=schedules)
    changes = {
        "steps": before.last_step + config.steps,
        "sequences_per_microbatch": config.sequences_per_microbatch,
        "optimizer": optimizer,
        "activation_checkpointing": config.activation_checkpointing
        or before.train.activation_checkpointing,
        "mesh": config.mesh or before.train.mesh,
    }
    return Stage(
        number,
        before.last_step,
        before.data.model_copy(update=sources | rows),
        before.train.model_copy(update=changes),
        *schedule,
        max(before.max_context, config.context_length),
        config.yarn or before.yarn,
        config.rope_base or before.rope_base,
    )
