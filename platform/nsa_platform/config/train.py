"""How training goes: batch in tokens, optimizer, schedule, checkpoints, workers, tracking."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from nsa_platform.config.base import Strict
from nsa_platform.config.locations import ServiceLocation
from nsa_platform.config.lora import LoraConfig
from nsa_platform.config.mesh import MeshConfig

Recompute = Literal["none", "selective", "branches", "full"]
RecomputePattern = Annotated[
    tuple[Recompute, ...],
    Field(min_length=1),
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
]
"""One way for all layers, or several that layers take in turn."""


class OptimizerConfig(Strict):
    """AdamW with a warm-up and a decay."""

    learning_rate: PositiveFloat = 3.0e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """cosine: warm-up, then half a cosine. wsd: warm-up, stable, linear decay at the end."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
    """wsd: the share of all steps that decays."""
    min_lr_factor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Last learning rate as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Only on matrices; embeddings, norms, biases and gates are not decayed."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: PositiveFloat = 1.0e-8
    max_grad_norm: PositiveFloat = 1.0


class GuardConfig(Strict):
    """Steps that are skipped because their loss or gradients are broken."""

    spike_sigmas: PositiveFloat | None = None
    """Skip a step whose loss or gradient norm lies this many standard deviations above the mean of
    the last 128 steps; 6 is usual for large models; null: only what is not finite is skipped."""
    halt_after: PositiveInt = 5
    """This many skipped steps in a row end the run."""


class CheckpointConfig(Strict):
    """When training state is saved and how much of it is kept."""

    every_steps: PositiveInt = 100
    keep_latest: PositiveInt = 2
    """How many of the newest checkpoints stay."""
    keep_best: Annotated[int, Field(ge=0)] = 1
    """How many of those with the best value of best_metric stay besides, among the checkpoints
    whose step was validated."""
    best_metric: Annotated[
        str,
        Field(
            pattern=r"^valid/(loss|bits_per_byte|needle_exact|needle_tokens"
            r"|loss_at/\d+|needle_exact_at/\d+)$"
        ),
    ] = "valid/loss"
    """Name of a metric of validations: valid/loss, valid/bits_per_byte, valid/needle_exact,
    valid/needle_tokens, or one at a length: valid/loss_at/8192, valid/needle_exact_at/8192."""
    best_mode: Literal["min", "max"] = "min"
    """Whether the lowest or the highest value is the best."""
    export: Literal["last", "best"] = "last"
    """Which checkpoint becomes the finished model."""
    asynchronous: bool = True
    """Write in the background while training goes on."""


class SamplesConfig(Strict):
    """Held-out prompts that the model answers at each validation, into a table of the MLflow run.

    Answers are the likeliest ones. Each of their tokens takes a pass over all that is answered so
    far: a look at the model, no benchmark.
    """

    num_prompts: Annotated[int, Field(ge=0)] = 0
    """The first of the validation split that fit; 0: none."""
    max_prompt_tokens: PositiveInt = 128
    """A text is continued from its beginning, so long at most and no more than half of it. A chat
    up to the assistant's first turn is a prompt if it is no longer."""
    max_new_tokens: PositiveInt = 64
    """Longest answer, and how much of the held-out text stands beside it."""


class NeedleCurveConfig(Strict):
    """Needles in haystacks of held-out text at each validation: one forward pass for each."""

    lengths: tuple[Annotated[int, Field(ge=64)], ...] = ()
    """Tokens of haystack and answer together; none: no needles. A stage looks for those that its
    rows can hold."""
    depths: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)] = (
        0.0,
        0.25,
        0.5,
        0.75,
        1.0,
    )
    """Where the needle stands, as a share of the haystack."""
    samples: PositiveInt = 1
    """Haystacks of each length and depth."""


class TrainConfig(Strict):
    """The loop."""

    steps: PositiveInt
    """Optimizer steps of the whole run."""
    tokens_per_step: PositiveInt
    """Tokens of one optimizer step over all workers; a multiple of the context length."""
    sequences_per_microbatch: PositiveInt = 1
    """Packed rows that one worker puts through the model at once."""
    lora: LoraConfig | None = None
    """Train low-rank adapters of a model that exists; null: train all of its weights."""
    optimizer: OptimizerConfig = OptimizerConfig()
    seed: int = 0
    """Initialisation of the weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type. Weights, optimizer state and gradient reduction stay float32."""
    compile: bool = False
    """torch.compile for each layer."""
    activation_checkpointing: RecomputePattern = ("none",)
    """What the backward pass computes again. full: all but the layers' inputs. selective: all but
    those and what attention returns, its dearest part. branches: selective, and of the attention
    the sliding branch, whose cost does not grow with the context. A list is taken in turn by the
    layers, from the first: [full, branches] spends the memory of branches on every second one."""
    parallel: Literal["auto", "replicate", "shard"] = "auto"
    """shard: FSDP2. replicate: gradients are averaged. auto: shard on GPU, with bfloat16 or with a
    mesh, else replicate."""
    mesh: MeshConfig = MeshConfig()
    profile: bool = False
    """Profile three steps of the first worker after the first three that it trains, and its GPU
    memory, into the run's artifacts. What ran is made readable while training goes on, which
    is slower meanwhile: half a minute where a step launches 100k operators."""
    log_every_steps: PositiveInt = 1
    validate_every_steps: PositiveInt = 100
    validation_tokens: PositiveInt = 65536
    """Held-out tokens of one validation."""
    validation: Literal["inline", "asynchronous"] = "inline"
    """inline: the workers validate and then train on. asynchronous: they train on, and a worker
    besides, which must hold the whole model, validates their checkpoints one after the other, with
    the same result. If it is slower than they are, checkpoint.keep_latest wait for it and older
    ones are left out; with checkpoint.export=best none is."""
    samples: SamplesConfig = SamplesConfig()
    needle: NeedleCurveConfig = NeedleCurveConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()

    @model_validator(mode="after")
    def _best_is_known(self) -> Self:
        checkpoint, every = self.checkpoint, self.validate_every_steps
        if checkpoint.export == "best" and (
            not checkpoint.keep_best or checkpoint.every_steps % every
        ):
            raise ValueError(
                f"checkpoint.export=best needs checkpoint.keep_best={checkpoint.keep_best} of at "
                f"least 1 and checkpoint.every_steps={checkpoint.every_steps} as a multiple of "
                f"validate_every_steps={every}: only validated checkpoints compare"
            )
        return self

    @model_validator(mode="after")
    def _best_metric_is_measured(self) -> Self:
        metric = self.checkpoint.best_metric
        if metric.startswith("valid/needle") and not self.needle.lengths:
            raise ValueError(f"checkpoint.best_metric={metric} needs needle.lengths")
        return self

    @model_validator(mode="after")
    def _what_is_validated_is_saved(self) -> Self:
        saved, validated = self.checkpoint.every_steps, self.validate_every_steps
        if self.validation == "asynchronous" and validated % saved:
            raise ValueError(
                f"validation=asynchronous reads checkpoints: validate_every_steps={validated} must "
                f"be a multiple of checkpoint.every_steps={saved}"
            )
        return self

    @model_validator(mode="after")
    def _replicas_are_plain(self) -> Self:
        if self.parallel == "replicate" and self.dtype == "bfloat16":
            raise ValueError(
                "parallel=replicate keeps one copy of the weights and computes in it, so it needs "
                "dtype=float32; for dtype=bfloat16 use parallel=shard (or auto)"
            )
        if self.parallel == "replicate" and not self.mesh.is_plain:
            raise ValueError(
                "parallel=replicate keeps everything on every worker; the axes of mesh need "
                "parallel=shard (or auto)"
            )
        return self


class ClusterConfig(Strict):
    """What is asked of Ray."""

    num_workers: PositiveInt = 1
    min_workers: PositiveInt | None = None
    """Elastic: training starts and goes on with as few workers as this while the cluster has no
    room for num_workers, and grows when it has; null: always num_workers."""
    grow_check_s: PositiveFloat = 60.0
    """Seconds after which an elastic run looks again whether the cluster has room for more workers.
    To grow it saves its state and starts all workers anew, so it had better not do so often."""
    use_gpu: bool = False
    """One GPU and nccl for each worker; otherwise CPU and gloo."""
    cpus_per_worker: PositiveInt = 1
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Worker failures that are survived before the run fails; -1: any number. Nodes that are
    taken away with a notice do not count."""
    price_per_worker_hour: PositiveFloat | None = None
    """What a worker costs in an hour, in any currency; only for the run's report."""

    @model_validator(mode="after")
    def _elastic_range(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers={self.min_workers} must not exceed num_workers={self.num_workers}"
            )
        return self


class TrackingConfig(Strict):
    """Where runs are recorded."""

    uri: ServiceLocation = "sqlite:///runs/mlflow.db"
    """MLflow tracking store: sqlite:///file, or http(s):// of a server."""
    experiment: str = "nsa"
    parent: Annotated[str, Field(min_length=1, max_length=250)] | None = None
    """Runs that give the same name stand together below a run of that name, which the first of
    them makes: the stages of one road, from data to a served model. null: a run for itself."""
    artifacts: ServiceLocation | None = None
    """Root of artifacts for a new experiment in a SQLite store; default: beside the database."""
    registered_model: str | None = None
    """Register the final model under this name."""
    alias: str = "champion"
    """Alias that the newly registered version gets."""

    @model_validator(mode="after")
    def _known_scheme(self) -> Self:
        if not self.uri.startswith(("sqlite:///", "http://", "https://", "postgresql")):
            raise ValueError(
                f"uri={self.uri!r} must start with sqlite:///, http://, https:// or postgresql"
            )
        return self
