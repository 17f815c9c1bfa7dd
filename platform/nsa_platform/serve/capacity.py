"""The cache of an engine: how many tokens it is to hold, from the configuration and the memory."""

from bisect import bisect_right

import psutil
import torch

from nsa_platform.config.model import ModelConfig
from nsa_platform.config.serve import EngineConfig
from nsa_platform.model.cost import count_parameters
from nsa_platform.serve.kv_cache import KvCache, page_size_of
from nsa_platform.serve.ranks import Ranks
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
    model: ModelConfig,
    config: EngineConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks | None = None,
) -> KvCache:
    """Reserve the cache. Ranks of one model call it together: they all get as many pages.

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
    if ranks is not None:
        num_tokens = ranks.least(num_tokens)
    return _cache(model, config, num_tokens, device=device, dtype=dtype)


def memory_budget(config: EngineConfig, device: torch.device, *, weight_bytes: int = 0) -> float:
    """Bytes that the cache may take; below 0 if there is no room for weights that are to come.

    weight_bytes: of weights that are not there yet.
    """
    share = config.gpu_memory_utilization if device.type == "cuda" else CPU_MEMORY_SHARE
    return (_free_bytes(device) - weight_bytes) * share


def check_memory(
    model: ModelConfig, config: EngineConfig, *, device: torch.device, dtype: torch.dtype
) -> None:
    """Tell, before weights are loaded, that they or the cache will not fit on a device.

    model: the share of one rank, which this device is to hold.

    Raises:
        ValueError: they do not fit; with the numbers, and what to change.
    """
    weight_bytes = count_parameters(model).total * dtype.itemsize
    budget = memory_budget(config, device, weight_bytes=weight_bytes)
    weights = f"weights take {_gib(weight_bytes)} of the {_gib(_free_bytes(device))} that are free"
    smaller = f"a larger tensor_parallel_size than {config.tensor_parallel_size}"
    if budget <= 0:
        raise ValueError(f"the {weights}: use {smaller} or a device with more memory")
    most, wanted = model_len_of(model, config), config.num_kv_tokens
    num_fitting = _tokens_in(budget, model, config, dtype=dtype)
    held = f"the {weights}, and the {_gib(budget)} for the cache hold {max(0, num_fitting)} tokens"
    if wanted is not None and wanted > num_fitting:
        raise ValueError(f"{held}: num_kv_tokens={wanted} must be lower, or use {smaller}")
    if wanted is None and num_fitting < most:
        raise ValueError(
            f"{held}, less than one request of max_model_len={most}: lower max_model_len or "
            f"max_num_seqs={config.max_num_seqs}, or use {smaller}"
        )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _tokens_in(
    budget: float, model: ModelConfig, config: EngineConfig, *, dtype: torch.dtype
) -> int:
    """Tokens that a cache of this many bytes holds; below 1 if it holds none. No more is looked at
    than anybody asks for."""
    most = config.num_kv_tokens or config.max_num_seqs * model_len_of(model, config)

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
        kv_dtype=torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else None,
    )
