"""What is measured on a trained model."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from nsa_platform.config.base import Strict, each_once
from nsa_platform.config.model import NsaChoices
from nsa_platform.config.serve import EngineConfig


class BitsPerByteConfig(Strict):
    """Compression of held-out text, a unit that does not depend on the tokenizer."""

    tokens: PositiveInt = 65536
    """Held-out tokens that are read."""
    context_length: PositiveInt = 1024
    """Tokens of one row; documents are cut at row ends."""
    sequences_per_batch: PositiveInt = 4
    """Rows that go through the model at once."""
    position_buckets: PositiveInt = 8
    """Equal parts of the context for which the loss is given separately."""
    baseline_tokens: PositiveInt = 4_000_000
    """Training tokens, at most, from which the unigram and bigram baselines count."""

    @model_validator(mode="after")
    def _parts_have_positions(self) -> Self:
        if self.position_buckets > self.context_length:
            raise ValueError(
                f"position_buckets={self.position_buckets} must not exceed "
                f"context_length={self.context_length}"
            )
        return self


class NeedleConfig(Strict):
    """Needle in a haystack over length x depth."""

    lengths: Annotated[
        tuple[Annotated[int, Field(ge=64)], ...], Field(min_length=1), AfterValidator(each_once)
    ] = (
        256,
        512,
        1024,
    )
    """Prompt lengths in tokens."""
    depths: Annotated[
        tuple[Annotated[float, Field(ge=0, le=1)], ...],
        Field(min_length=1),
        AfterValidator(each_once),
    ] = (
        0.0,
        0.25,
        0.5,
        0.75,
        1.0,
    )
    """Where the needle stands, as a share of the haystack."""
    samples: PositiveInt = 2
    """Haystacks per cell."""
    keys: Annotated[int, Field(ge=1, le=25)] = 1
    """Words that have a secret number; more than one: multi-key."""
    values: PositiveInt = 1
    """Numbers of each word; more than one: multi-value."""
    queries: PositiveInt = 1
    """Words that are asked for; more than one: multi-query."""
    filler: Literal["heldout", "synthetic"] = "heldout"
    """heldout: the haystack is held-out text of the data. synthetic: five plain sentences."""
    seed: int = 0

    @model_validator(mode="after")
    def _asked_words_exist(self) -> Self:
        if self.queries > self.keys:
            raise ValueError(f"queries={self.queries} must not exceed keys={self.keys}")
        return self


BaselineName = Literal[
    "full", "sliding", "streaming", "h2o", "quest", "infllm", "exact_top", "minference"
]


class PatternSearchConfig(Strict):
    """MInference's offline search of a pattern for each head (arXiv 2407.02490, 3.2)."""

    sample: Literal["pairs", "heldout"] = "pairs"
    """pairs: UUIDs that stand for UUIDs, and a question for one, as published. heldout: held-out
    text of the data."""
    tokens: Annotated[int, Field(ge=128)] = 30_000
    """Of the sample, at most the model's max_context. Its last 64 queries find columns and
    diagonals: of fewer than twice as many tokens there would be little to find. The paper: 30k."""
    vertical_slash: Annotated[tuple[tuple[PositiveInt, PositiveInt], ...], Field(min_length=1)] = (
        (30, 800),
        (100, 750),
        (500, 700),
        (3500, 100),
        (1000, 4096),
    )
    """Ratios of columns to diagonals that vertical-slash is offered in; sizes follow the budget.
    The default are those of the published search."""
    seed: int = 0


class BaselinesConfig(Strict):
    """Training-free policies over the keys and values of a checkpoint with full attention.

    Each is measured on the same text and the same needles as the model itself.
    """

    systems: Annotated[tuple[BaselineName, ...], Field(min_length=1)] = (
        "full",
        "sliding",
        "streaming",
        "h2o",
        "quest",
        "infllm",
        "exact_top",
        "minference",
    )
    """Which policies, each once."""
    budget: Literal["equal", "published"] = "equal"
    """equal: as many keys per query as nsa reads on average at the length at hand, of which 1/20
    lead and 1/5 are local (arXiv 2502.11089, 4.2: 128 and 512 of 2560). published: every policy
    with the sizes of its paper."""
    nsa: NsaChoices = NsaChoices()
    """The NSA whose budget counts when budget=equal; its sizes should suit the length."""
    tokens: Annotated[int, Field(ge=3)] | None = None
    """Tokens of an equal budget at every length; null: from nsa. The paper: 2560. Of no use to
    budget=published."""
    decoded_tail: PositiveInt = 64
    """Last tokens of a prompt that are decoded one by one: policies with a dense prefill then read
    the question by their own rule."""

    minference: PatternSearchConfig | None = PatternSearchConfig()
    """How MInference's patterns are searched; null: every head is vertical-slash, half and half."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.systems)) < len(self.systems):
            raise ValueError(f"systems={list(self.systems)} must name each policy once")
        return self

    @model_validator(mode="after")
    def _published_sizes_are_fixed(self) -> Self:
        if self.budget == "published":
            for key, unset in (("tokens", None), ("nsa", NsaChoices())):
                if (value := getattr(self, key)) != unset:
                    raise ValueError(
                        f"{key}={value} is of no use to budget=published: it is that of an equal "
                        "one"
                    )
        return self


class EvaluationEngineConfig(EngineConfig):
    """Sizes of the engine that answers needles and tasks. Nobody waits for a single answer, and the
    scorers of whole texts need memory beside the cache."""

    fixed = ("tensor_parallel_size", "hf_overrides", "dtype")
    max_model_len: PositiveInt | None = None
    """Tokens of one request, prompt and output together; null: of the longest needle or task."""
    max_num_seqs: PositiveInt = 32
    """Answers that are written at once."""
    max_step_ms: PositiveFloat | None = None
    """Chunks of prompts are cut so that a step takes no longer. null: as long as
    max_num_batched_tokens make it."""
    warm_up: bool = False
    """Run steps of all kinds before the first prompt. Kernels are compiled once in any case; here
    no request would be the later for it."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the free GPU memory that the cache may take when num_kv_tokens is null."""

    @model_validator(mode="after")
    def _the_model_is_as_it_was_loaded(self) -> Self:
        for name in self.fixed:
            default = EngineConfig.model_fields[name].default
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name} must stay as it is: the model is loaded once, as it was exported, "
                    "for all that is measured"
                )
        return self
