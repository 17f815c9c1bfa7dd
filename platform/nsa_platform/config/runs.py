"""One root for each kind of YAML file; the file's folder under jobs/configs names its root."""

from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from nsa_platform.config.base import Strict
from nsa_platform.config.data import CorpusConfig, LoaderConfig, TokenizerConfig
from nsa_platform.config.evaluate import BaselinesConfig, BitsPerByteConfig, NeedleConfig
from nsa_platform.config.locations import Location, ModelLocation
from nsa_platform.config.model import ModelConfig
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

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        problems = self._problems()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> list[str]:
        """What is wrong between the sections."""
        workers = self.cluster.num_workers
        # An elastic run may be given any number of workers in its range.
        for count in range(self.cluster.min_workers or workers, workers + 1):
            misfits = self.train.mesh.world_problems(count, self.data.context_length)
            if misfits:
                return [f"train.mesh: {line}" for line in misfits]
        samples, length = self.train.samples, self.data.context_length
        longest = samples.max_prompt_tokens + samples.max_new_tokens
        if samples.num_prompts and longest > length:
            return [
                f"train.samples: max_prompt_tokens={samples.max_prompt_tokens} + "
                f"max_new_tokens={samples.max_new_tokens} = {longest} must not exceed "
                f"data.context_length={length}"
            ]
        dealt = self.train.mesh.data_workers(workers)
        unit = self.data.context_length * self.train.sequences_per_microbatch * dealt
        if self.train.tokens_per_step % unit:
            shared = "" if dealt == workers else f" / {workers // dealt} workers that share rows"
            return [
                f"train.tokens_per_step={self.train.tokens_per_step} must be a multiple of "
                f"data.context_length={self.data.context_length} x "
                f"train.sequences_per_microbatch={self.train.sequences_per_microbatch} x "
                f"cluster.num_workers={workers}{shared} = {unit}"
            ]
        return []


class PretrainRun(_TrainingRun):
    """Train a model on text shards: a new one, or an exported one further. Give exactly one of
    model and checkpoint."""

    model: ModelConfig | None = None
    """A new model."""
    checkpoint: ModelLocation | None = None
    """Exported model folder to train further, local or s3://, or models:/name@alias."""

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
        if self.model is not None:
            misfits = self.train.mesh.model_problems(self.model)
            problems += [f"train.mesh: {line}" for line in misfits]
        return problems


class SftRun(_TrainingRun):
    """Fine-tune an exported model on chat shards: the same loop with a loss mask."""

    checkpoint: ModelLocation
    """Exported model folder, local or s3://, or models:/name@alias."""


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
    def _baselines_have_a_task(self) -> Self:
        is_measured = self.bits_per_byte is not None or self.needle is not None or self.tasks
        if self.baselines is not None and not is_measured:
            raise ValueError("baselines need bits_per_byte, needle or tasks to be measured by")
        return self
