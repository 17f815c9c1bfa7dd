"""One root for each kind of YAML file; the file's folder under jobs/configs names its root."""

from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from nsa_platform.config.base import Strict
from nsa_platform.config.data import (
    CorpusConfig,
    DeduplicateConfig,
    LoaderConfig,
    TokenizerConfig,
)
from nsa_platform.config.evaluate import (
    BaselinesConfig,
    BitsPerByteConfig,
    EvaluationEngineConfig,
    NeedleConfig,
)
from nsa_platform.config.locations import Location, ModelLocation
from nsa_platform.config.model import ModelConfig
from nsa_platform.config.stages import Stage, StageConfig, resolve_stages
from nsa_platform.config.tasks import TaskConfig
from nsa_platform.config.train import ClusterConfig, TrackingConfig, TrainConfig

RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
"""Letters, digits, dots, dashes and underscores: a run's name is also the name of its folder."""


class PrepareDataRun(Strict):
    """Raw text or chats to Arrow shards with a manifest."""

    name: RunName
    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    output: Location
    """Folder to write, local or s3://: tokenizer/, train/, validation/."""
    shard_tokens: PositiveInt = 16_000_000
    """Target size of one shard."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of documents held out, chosen by a hash of their content."""
    deduplicate: DeduplicateConfig | None = None
    """Leave out copies of documents; null: leave all in."""
    num_tasks: PositiveInt | None = None
    """Ray tasks that tokenise at once; default: one for each CPU of the cluster."""
    tracking: TrackingConfig | None = None
    """Where the preparation is recorded; null: nowhere."""


class _TrainingRun(Strict):
    name: RunName
    """Name of the run: the same name under the same storage resumes."""
    data: LoaderConfig
    train: TrainConfig
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    storage: Location = "runs"
    """Folder of checkpoints and the final model, local or s3://; the run's own is storage/name."""

    def in_stages(self) -> tuple[Stage, ...]:
        """The run's stages with all that holds in each; one if the configuration lists none."""
        return resolve_stages(self.data, self.train, ())

    def model_problems(self, model: ModelConfig) -> list[str]:
        """Why the mesh of some stage cannot share the model."""
        return [
            f"{'train' if not stage.number else f'stages.{stage.number - 1}'}.mesh: {line}"
            for stage in self.in_stages()
            for line in stage.train.mesh.model_problems(stage.model_of(model))
        ]

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        problems = self._problems()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> list[str]:
        """What is wrong between the sections."""
        first, *later = self.in_stages()
        problems = _rows_problems(first, self.cluster)
        for stage in later:
            found = _rows_problems(stage, self.cluster)
            problems += [f"stages.{stage.number - 1}: {line}" for line in found]
        return problems + _needle_problems((first, *later))


def _rows_problems(stage: Stage, cluster: ClusterConfig) -> list[str]:
    """Why the workers cannot be dealt the rows of a step."""
    data, train, workers = stage.data, stage.train, cluster.num_workers
    # An elastic run may be given any number of workers in its range.
    for count in range(cluster.min_workers or workers, workers + 1):
        misfits = train.mesh.world_problems(count, data.context_length)
        if misfits:
            return [f"train.mesh: {line}" for line in misfits]
    samples, length = train.samples, data.context_length
    longest = samples.max_prompt_tokens + samples.max_new_tokens
    if samples.num_prompts and longest > length:
        return [
            f"train.samples: max_prompt_tokens={samples.max_prompt_tokens} + "
            f"max_new_tokens={samples.max_new_tokens} = {longest} must not exceed "
            f"data.context_length={length}"
        ]
    dealt = train.mesh.data_workers(workers)
    unit = data.context_length * train.sequences_per_microbatch * dealt
    if train.tokens_per_step % unit:
        shared = "" if dealt == workers else f" / {workers // dealt} workers that share rows"
        return [
            f"train.tokens_per_step={train.tokens_per_step} must be a multiple of "
            f"data.context_length={data.context_length} x "
            f"train.sequences_per_microbatch={train.sequences_per_microbatch} x "
            f"cluster.num_workers={workers}{shared} = {unit}"
        ]
    return []


def _needle_problems(stages: tuple[Stage, ...]) -> list[str]:
    """Why no stage can look for some needles."""
    longest = max(stage.data.context_length for stage in stages)
    return [
        f"train.needle: lengths={length} must not exceed the longest context_length={longest}"
        for length in stages[0].train.needle.lengths
        if length > longest
    ]


def _stretch_problems(stage: Stage, model: ModelConfig | None) -> list[str]:
    """Why positions do not reach as far as the rows of a later stage."""
    yarn = stage.yarn or (model.yarn if model else None)
    length = stage.data.context_length
    if yarn is None or yarn.factor * yarn.original_context >= length:
        return []
    return [
        f"stages.{stage.number - 1}: context_length={length} must not exceed yarn.factor="
        f"{yarn.factor:g} x yarn.original_context={yarn.original_context}"
    ]


class PretrainRun(_TrainingRun):
    """Train a model on text shards: a new one, or an exported one further. Give exactly one of
    model and checkpoint."""

    model: ModelConfig | None = None
    """A new model."""
    checkpoint: ModelLocation | None = None
    """Exported model folder to train further, local or s3://, or models:/name@alias."""
    stages: tuple[StageConfig, ...] = ()
    """Stages that follow the one that data and train describe, as of a growing context."""

    def in_stages(self) -> tuple[Stage, ...]:
        return resolve_stages(self.data, self.train, self.stages)

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if (self.model is None) == (self.checkpoint is None):
            problems.append("give exactly one of model and checkpoint")
        if self.model is not None and self.data.context_length > self.model.max_context:
            problems.append(
                f"data.context_length={self.data.context_length} must not exceed "
                f"model.max_context={self.model.max_context}"
            )
        if self.model is not None and self.train.lora is not None:
            problems.append("train.lora adapts a model that exists: give checkpoint, not model")
        for stage in self.in_stages()[1:]:
            problems += _stretch_problems(stage, self.model)
        if self.model is not None:
            problems += self.model_problems(self.model)
        return problems


class SftRun(_TrainingRun):
    """Fine-tune an exported model on chat shards: the same loop with a loss mask."""

    checkpoint: ModelLocation
    """Exported model folder, local or s3://, or models:/name@alias."""


class VariantConfig(Strict):
    """One of the configurations that a sweep compares."""

    name: RunName
    overrides: tuple[str, ...] = ()
    """a.b=value, as --set takes them, on top of the sweep's own."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] | None = None
    """Default: the sweep's."""


class SweepRun(Strict):
    """Pretrain variants of one configuration with several seeds, and compare them.

    A seed is train.seed and data.seed: with the same seed variants see the same rows in the same
    order, and what weights they share in shape and name begins alike.
    """

    name: RunName
    """Of the sweep, and of the MLflow run below which its runs stand."""
    base: Location
    """YAML file of a PretrainRun, local."""
    overrides: tuple[str, ...] = ()
    """a.b=value, as --set takes them, for all variants."""
    variants: Annotated[tuple[VariantConfig, ...], Field(min_length=1)]
    """In the order in which they are trained; the first is what the others are compared with."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    at_once: PositiveInt = 1
    """Runs that are trained side by side, each with the workers that base asks for."""

    @model_validator(mode="after")
    def _each_run_once(self) -> Self:
        names = [variant.name for variant in self.variants]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"variants: {', '.join(twice)} must not stand twice")
        for seeds in (self.seeds, *(variant.seeds or () for variant in self.variants)):
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"seeds={list(seeds)} must name each seed once")
        return self


class EvaluateRun(Strict):
    """Measure an exported model."""

    name: RunName
    checkpoint: ModelLocation
    """Exported model folder, local or s3://, or models:/name@alias."""
    data: Location
    """Folder made by prepare_data, local or s3://: validation/ is measured, the baselines count
    tokens of train/."""
    bits_per_byte: BitsPerByteConfig | None = BitsPerByteConfig()
    needle: NeedleConfig | None = NeedleConfig()
    tasks: tuple[TaskConfig, ...] = ()
    """Tasks with answers, each kind at most once."""
    engine: EvaluationEngineConfig = EvaluationEngineConfig()
    """It writes the model's answers to needles and tasks, many at once."""
    baselines: BaselinesConfig | None = None
    """Policies that are measured beside the model, on the same text, needles and tasks; for a model
    with full attention. null: none."""
    use_gpu: bool = False
    tracking: TrackingConfig = TrackingConfig()
    storage: Location = "runs"
    """Folder of what a tracking store out of reach has not taken yet, below storage/name."""

    @model_validator(mode="after")
    def _each_task_once(self) -> Self:
        kinds = [task.kind for task in self.tasks]
        twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        if twice:
            raise ValueError(f"tasks: {', '.join(twice)} must not stand twice")
        return self

    @model_validator(mode="after")
    def _something_is_measured(self) -> Self:
        if self.bits_per_byte is None and self.needle is None and not self.tasks:
            raise ValueError(
                "bits_per_byte=null, needle=null and no tasks: give at least one, or there is "
                "nothing to measure"
            )
        return self
