"""What a serving engine holds and how much it does in one step."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from nsa_platform.config.base import Strict
from nsa_platform.config.model import ModelConfig, YarnConfig


class ModelOverrides(Strict):
    """Sizes of an exported model that no weight depends on, and that may be served differently."""

    max_context: PositiveInt | None = None
    """Longest sequence in tokens; null: as exported."""
    yarn: YarnConfig | None = None
    """Stretches the positions to it; null: as exported."""
    rope_base: PositiveFloat | None = None
    """null: as exported."""

    def of(self, model: ModelConfig) -> ModelConfig:
        """The model's configuration with what is overridden."""
        changes = {name: getattr(self, name) for name in type(self).model_fields}
        return model.model_copy(update={k: v for k, v in changes.items() if v is not None})


class EngineConfig(Strict):
    """Sizes of one engine: one model on one device, or on several that share it. Names are those of
    vLLM's engine flags."""

    tensor_parallel_size: PositiveInt = 1
    """Ranks that compute the model together, on a GPU each: key/value heads are dealt to them with
    their query heads, hidden units too. It must divide both."""
    max_model_len: PositiveInt | None = None
    """Tokens of one request, prompt and output together; null: the model's max_context."""
    hf_overrides: ModelOverrides = ModelOverrides()
    """Serve the model for a longer context than it was exported for."""
    max_num_seqs: PositiveInt = 16
    """Requests that run at once."""
    max_num_batched_tokens: PositiveInt = 2048
    """Tokens of one step: one for each request that decodes, the rest for chunks of prompts."""
    max_step_ms: PositiveFloat | None = 40.0
    """Chunks of prompts are cut so that a step takes no longer, as measured steps predict, or half
    as long again as it would take without their tokens: a decode waits no longer for its next
    token, a short prompt no longer for its turn. Steps with prompts are launched kernel by kernel,
    which may take longer than this by itself. null: as long as max_num_batched_tokens make it."""
    max_num_partial_prefills: PositiveInt = 8
    """Prompts that share a step's tokens."""
    max_long_partial_prefills: PositiveInt = 4
    """Long ones among them; short ones need not wait behind more."""
    long_prefill_token_threshold: PositiveInt = 8192
    """A prompt with more tokens to compute is long."""
    block_size: PositiveInt | None = None
    """Tokens of a page, a multiple of the model's selection block (full attention: of 64); null:
    one block."""
    num_kv_tokens: PositiveInt | None = None
    """Tokens that the cache holds; null: for max_num_seqs requests of max_model_len, as far as
    memory goes."""
    enable_prefix_caching: bool = True
    """Keep what is known of earlier prompts and answers as long as their memory is not needed: a
    request that begins with the same tokens computes only the rest."""
    enforce_eager: bool = False
    """Launch every kernel of a decode step from Python instead of replaying a CUDA graph. On a CPU
    there are no graphs."""
    warm_up: bool = True
    """Run steps of all kinds before the first request, so that none waits until a kernel is
    compiled. The first time on a machine that takes minutes; what is compiled stays on its disk. A
    CPU compiles nothing."""
    cudagraph_capture_sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    """Numbers of sequences that graphs are captured for; a step takes the next larger one. null: 1,
    2, 4, 8, multiples of 16, max_num_seqs."""
    async_scheduling: bool | None = None
    """Give the device the next step of decodes before the tokens of the last one are known to the
    host: it never waits for Python. Answers are the same. null: on a GPU."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the free GPU memory that the cache may take when num_kv_tokens is null."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and cache; auto: bfloat16 on a GPU, float32 on a CPU."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Of the keys and values that attention reads as they are. fp8 (e4m3) takes a byte for each
    number and rounds it: about twice as many tokens fit. What blocks are chosen by, and what phi
    folds, stays as it is. GPUs of compute capability 8.9 or later have it. auto: dtype."""
    identity_mismatch: Literal["warn", "error", "ignore"] = "warn"
    """What to do with a model that was exported with other kernels or another configuration than
    those here: its selected blocks may differ from those of its training."""
    max_num_queued: PositiveInt = 256
    """Requests that may wait; more are refused at once."""
    max_ttft_s: PositiveFloat | None = None
    """A request whose first token is predicted to come later is refused at once; null: none is."""
    seed: int = 0
    """Together with its id it seeds a request that brings no seed of its own."""

    def runs_ahead(self, *, is_on_gpu: bool) -> bool:
        """What async_scheduling comes to."""
        return is_on_gpu if self.async_scheduling is None else self.async_scheduling

    @model_validator(mode="after")
    def _limits_fit(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}: every running request decodes in every step"
            )
        if self.max_long_partial_prefills > self.max_num_partial_prefills:
            raise ValueError(
                f"max_long_partial_prefills={self.max_long_partial_prefills} must not exceed "
                f"max_num_partial_prefills={self.max_num_partial_prefills}"
            )
        return self
