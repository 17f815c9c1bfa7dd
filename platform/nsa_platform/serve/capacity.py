"""The cache of an engine: how many tokens it is to hold, from the configuration and the memory."""

from bisect import bisect_right

import psutil
import torch

from nsa_platform.config.model import ModelConfig
from nsa_platform.config.serve import EngineConfig
from nsa_platform.serve.kv_cache import KvCache, page_size_of
from nsa_platform.serve.scheduler import Limits

CPU_MEMORY_SHARE = 0.25
"""Of the memory that is available: the machine does other things too."""


def model_len_of(model: ModelConfig, config: EngineConfig) -> int:
    """Tokens of one request at most.

    Raises:
        ValueError: the configuration asks for more than the model is meant for.
    """
    if config.max_model_len is None:
        return model.max_context
    if config.max_model_len > model.max_context:
        raise ValueError(
            f"max_model_len={config.max_model_len} must not exceed the model's "
            f"max_context={model.max_context}"
        )
    return config.max_model_len


def blocks_per_page_of(model: ModelConfig, config: EngineConfig) -> int:
    """Blocks of a page.

    Raises:
        ValueError: block_size is no multiple of one block.
    """
    block = page_size_of(model)
    if config.block_size is None:
        return 1
    if config.block_size % block:
        raise ValueError(f"block_size={config.block_size} must be a multiple of {block} tokens")
    return config.block_size // block


def limits_of(config: EngineConfig) -> Limits:
    """What the configuration says of steps, in the scheduler's words."""
    return Limits(
        max_num_seqs=config.max_num_seqs,
        max_step_tokens=config.max_num_batched_tokens,
        max_step_s=None if config.max_step_ms is None else config.max_step_ms / 1000,
        max_prompts=config.max_num_partial_prefills,
        max_long_prompts=config.max_long_partial_prefills,
        long_prompt_tokens=config.long_prefill_token_threshold,
    )


def make_cache(
    model: ModelConfig, config: EngineConfig, *, device: torch.device, dtype: torch.dtype
) -> KvCache:
    """Reserve the cache.

    Raises:
        ValueError: a size does not fit the model, or the memory holds no request of any length.
    """
    num_tokens = config.num_kv_tokens
    if num_tokens is None:
        most = config.max_num_seqs * model_len_of(model, config)
        budget = memory_budget(config, device)
        num_tokens = min(most, _tokens_in(budget, model, config, dtype=dtype))
        if num_tokens < 1:
            raise ValueError(
                f"{budget / 2**20:.0f} MiB of memory for the cache hold not even a page for each "
                f"of max_num_seqs={config.max_num_seqs} requests"
            )
    return _cache(model, config, num_tokens, device=device, dtype=dtype)


def memory_budget(config: EngineConfig, device: torch.device) -> float:
    """Bytes that the cache may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * config.gpu_memory_utilization
    return psutil.virtual_memory().available * CPU_MEMORY_SHARE


def _tokens_in(
    budget: float, model: ModelConfig, config: EngineConfig, *, dtype: torch.dtype
) -> int:
    """Tokens that a cache of this many bytes holds; below 1 if it holds none."""
    most = config.max_num_seqs * model_len_of(model, config)

    def num_bytes(num_tokens: int) -> int:
        # Tensors on the meta device have sizes and take no memory.
        meta = torch.device("meta")
        return _cache(model, config, num_tokens, device=meta, dtype=dtype).num_bytes()

    return bisect_right(range(1, most + 1), budget, key=num_bytes)


def _cache(
    model: ModelConfig,
    config: EngineConfig,
    num_tokens: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> KvCache:
    return KvCache(
        model,
        num_tokens=num_tokens,
        max_new_tokens=min(config.max_num_batched_tokens, model_len_of(model, config)),
        max_sequences=config.max_num_seqs,
        max_step_tokens=config.max_num_batched_tokens,
        blocks_per_page=blocks_per_page_of(model, config),
        enable_prefix_caching=config.enable_prefix_caching,
        device=device,
        dtype=dtype,
    )
