"""What a GPU, or several that share a model, can serve of it, from its configuration alone: memory,
places, speed limits.

Speeds are bounds that nothing can beat: every product at the GPU's peak, every byte once at its
full bandwidth, nothing between them, no message between GPUs. What an engine reaches is measured,
not planned.
"""

from bisect import bisect_right
from dataclasses import dataclass

import torch

from nsa_platform.config.model import (
    AttentionConfig,
    MlaAttentionConfig,
    ModelConfig,
    NsaAttentionConfig,
)
from nsa_platform.config.serve import EngineConfig
from nsa_platform.model.cost import (
    CacheBytes,
    cache_bytes,
    cached_channels,
    count_parameters,
    flops_per_token,
)
from nsa_platform.model.tensor_parallel import share_of
from nsa_platform.serve.capacity import blocks_per_page_of
from nsa_platform.serve.kv_cache import KvCache, check_fp8_cache, page_size_of

ELEMENT_BYTES = 2
"""bfloat16 weights and cache."""
WORKSPACE_BYTES = 2 << 30
"""What torch, the kernels' scratch and the tokens of a step take beside them, about."""
HOST_BYTES = 8 << 30
"""What Ray, torch and CUDA take of the host's memory, about."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, as its maker describes it."""

    memory_bytes: int
    """What a process can have of it."""
    bytes_per_s: float
    """Bandwidth of its memory."""
    flops_per_s: float
    """Dense bfloat16 products."""
    has_fp8: bool = True
    """Whether it can read an fp8 cache."""


GPUS = {
    "A100": Gpu(79 << 30, 2.04e12, 312e12, has_fp8=False),
    "H100": Gpu(79 << 30, 3.35e12, 989e12),
    "H200": Gpu(139 << 30, 4.8e12, 989e12),
    "B200": Gpu(178 << 30, 8.0e12, 2250e12),
    "L40S": Gpu(44 << 30, 0.864e12, 362e12),
    "MI300X": Gpu(190 << 30, 5.3e12, 1307e12),
}
"""By Ray's names of accelerators where it has them. Source: the makers' data sheets."""


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """What each GPU of a replica holds, and how fast the replica could be at best."""

    weight_bytes: int
    budget_bytes: int
    """Left for the cache; below 0: the weights do not fit."""
    sequence: CacheBytes
    """Of one sequence of the whole context, in whole pages, what each GPU has of it."""
    num_fitting: int
    """Sequences of the whole context that the cache holds, with the pages of what is not theirs
    alone: tokens of a step, and tails that the prefix cache keeps."""
    num_sequences: int
    """How many of them run at once; 0: not even one fits."""
    ttft_s: float
    """Least time to compute a prompt of the whole context."""
    step_s: float
    """Least time of a step that decodes one token for one sequence of the whole context."""
    full_step_s: float
    """The same for num_sequences of them; 0 if there are none."""

    @property
    def tokens_per_s(self) -> float:
        """Most tokens a second of one sequence alone."""
        return 1 / self.step_s

    @property
    def host_bytes(self) -> int:
        """Of the host's memory for each GPU: weights pass through it twice while they load."""
        return HOST_BYTES + 2 * self.weight_bytes

    @property
    def full_tokens_per_s(self) -> float:
        """Most tokens a second of num_sequences together."""
        return self.num_sequences / self.full_step_s if self.num_sequences else 0.0


def plan_serving(
    model: ModelConfig,
    gpu: Gpu,
    engine: EngineConfig,
    *,
    context: int,
    num_ranks: int | None = None,
) -> ServingPlan:
    """Work it out; nothing is built or read.

    Args:
        engine: what counts of it are the sizes of the cache and of a step.
        context: tokens of one sequence, prompt and output together.
        num_ranks: GPUs that compute the model together; None: engine.tensor_parallel_size.

    Raises:
        ValueError: context or num_ranks is not positive, the model cannot be dealt to so many GPUs,
            or model or GPU cannot have an fp8 cache.
    """
    num_ranks = engine.tensor_parallel_size if num_ranks is None else num_ranks
    if min(context, num_ranks) < 1:
        raise ValueError(f"context={context} and tensor_parallel_size={num_ranks} must be positive")
    kv_bytes = kv_bytes_of(engine)
    if kv_bytes < ELEMENT_BYTES:
        check_fp8_cache(model)
        if not gpu.has_fp8:
            raise ValueError("kv_cache_dtype=fp8 takes a GPU of compute capability 8.9 or later")
    model = share_of(model, num_ranks)
    parameters = count_parameters(model)
    weight_bytes = parameters.total * ELEMENT_BYTES
    free = gpu.memory_bytes - WORKSPACE_BYTES - weight_bytes
    budget = int(free * engine.gpu_memory_utilization) if free > 0 else free
    sequence = cache_bytes(
        model,
        context,
        element_bytes=ELEMENT_BYTES,
        kv_bytes=kv_bytes,
        page_size=page_size_of(model, blocks_per_page_of(model, engine)),
    )
    num_fitting = bisect_right(
        range(1, max(0, budget // sequence.total) + 1),
        budget,
        key=lambda sequences: reserved_bytes(model, engine, context=context, sequences=sequences),
    )
    num_sequences = min(engine.max_num_seqs, num_fitting)
    read = parameters.active * ELEMENT_BYTES
    cached = decode_read_bytes(model, context, kv_bytes=kv_bytes)
    prefill_flops = flops_per_token(model, context).forward * context
    return ServingPlan(
        weight_bytes=weight_bytes,
        budget_bytes=budget,
        sequence=sequence,
        num_fitting=num_fitting,
        num_sequences=num_sequences,
        ttft_s=max(prefill_flops / gpu.flops_per_s, read / gpu.bytes_per_s),
        step_s=(read + cached) / gpu.bytes_per_s,
        full_step_s=(read + num_sequences * cached) / gpu.bytes_per_s if num_sequences else 0.0,
    )


def reserved_bytes(
    model: ModelConfig, engine: EngineConfig, *, context: int, sequences: int
) -> int:
    """Memory of a cache for so many sequences of a context, as an engine reserves it."""
    return KvCache(
        model,
        num_tokens=sequences * context,
        max_new_tokens=min(engine.max_num_batched_tokens, context),
        max_sequences=sequences,
        max_step_tokens=engine.max_num_batched_tokens,
        blocks_per_page=blocks_per_page_of(model, engine),
        enable_prefix_caching=engine.enable_prefix_caching,
        # Tensors on the meta device have sizes and take no memory.
        device="meta",
        dtype=torch.bfloat16,
        kv_dtype=torch.float8_e4m3fn if engine.kv_cache_dtype == "fp8" else None,
    ).num_bytes()


def kv_bytes_of(config: EngineConfig) -> int:
    """Bytes of a number of the cache's keys and values."""
    return 1 if config.kv_cache_dtype == "fp8" else ELEMENT_BYTES


def decode_read_bytes(model: ModelConfig, context: int, *, kv_bytes: int = ELEMENT_BYTES) -> int:
    """Bytes of the cache that one new token after `context` others reads, over all layers."""
    compressed, kept = _decode_keys(model.attention, context)
    read = compressed * ELEMENT_BYTES + kept * kv_bytes
    return model.layers * cached_channels(model.attention) * read


def decode_attention_flops(model: ModelConfig, context: int) -> int:
    """Operations of that token with what it reads, over all layers; MLA's are on its latents."""
    attention = model.attention
    widths = attention.key_width + attention.value_width
    if isinstance(attention, MlaAttentionConfig):
        widths = attention.cached_width + attention.kv_lora_rank
    keys = sum(_decode_keys(attention, context))
    return model.layers * 2 * attention.query_heads * widths * keys


def _decode_keys(attention: AttentionConfig, context: int) -> tuple[int, int]:
    """Compressed keys, and keys kept as they are, that one new token reads."""
    if not isinstance(attention, NsaAttentionConfig):
        return 0, context
    size, stride = attention.compression_block_size, attention.compression_stride
    blocks = 0 if context < size else (context - size) // stride + 1
    selected = attention.num_selected_blocks * attention.selection_block_size
    return blocks, min(selected, context) + min(attention.window_size, context)
