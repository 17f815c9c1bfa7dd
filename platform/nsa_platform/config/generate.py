"""Batch inference: prompts in, one result for each, in the same order."""

from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from nsa_platform.config.base import Strict
from nsa_platform.config.locations import Location, ModelLocation, ServiceLocation
from nsa_platform.config.runs import RunName
from nsa_platform.config.serve import EngineConfig

Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[int, Field(ge=0)]


class SamplingConfig(Strict):
    """How every prompt is continued. Names and meanings are those of the HTTP API."""

    max_tokens: PositiveInt = 256
    """Tokens to generate at most; a prompt that leaves no room for them is reported, not cut."""
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Nothing ends the text before this many tokens."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0: the likeliest token, always. Above: scores are divided by it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the likeliest tokens whose probabilities add up to this are eligible."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Only this many of the likeliest tokens are eligible; 0: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Only tokens at least this share as likely as the likeliest one are eligible."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """The text ends before the first of these strings."""
    stop_token_ids: tuple[TokenId, ...] = ()
    """Ids that end the text beside the tokenizer's own."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    """The tokenizer's own stop ids are ordinary tokens."""

    @model_validator(mode="after")
    def _least_is_not_above_most(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} must not exceed max_tokens={self.max_tokens}"
            )
        return self


class GenerationWorkers(Strict):
    """What is asked of Ray. The results do not depend on the number of workers."""

    num_workers: PositiveInt = 1
    """Engines that work at once; those that the cluster has no room for yet join later."""
    use_gpu: bool = False
    """One GPU for each worker."""
    cpus_per_worker: PositiveInt = 1
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """How often a worker may die and be started again; -1: any number."""


class GenerateRun(Strict):
    """Continue every prompt of some files with an exported model."""

    name: RunName
    checkpoint: ModelLocation
    """Exported model folder, local or s3://, or models:/name@alias."""
    inputs: Annotated[tuple[Location, ...], Field(min_length=1)]
    """JSONL or Arrow files, or folders of them, local or s3://. A row has `prompt` (a text that is
    continued) or `messages` (an OpenAI chat that is answered), and perhaps an `id`."""
    output: Location
    """Folder to write, local or s3://: results.jsonl, a line for each row, in the same order."""
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
    """Its seed and a row's number seed what is drawn for that row."""
    cluster: GenerationWorkers = GenerationWorkers()
    rows_per_part: PositiveInt = 256
    """Rows that one worker takes at a time and that a killed run does not have to repeat."""
    tracking_uri: ServiceLocation = "sqlite:///runs/mlflow.db"
    """MLflow store that knows a checkpoint of models:/."""

    @model_validator(mode="after")
    def _a_worker_is_one_rank(self) -> Self:
        size = self.engine.tensor_parallel_size
        if size > 1:
            raise ValueError(
                f"engine.tensor_parallel_size={size} must be 1: a worker of batch inference has "
                "the whole model"
            )
        return self
