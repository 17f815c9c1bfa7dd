"""An engine from the folder of an exported model."""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from nsa_platform.config.model import ModelConfig
from nsa_platform.config.serve import EngineConfig
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.model.identity import IDENTITY_KEY, differences
from nsa_platform.model.partition import Axis
from nsa_platform.model.tensor_parallel import share_of
from nsa_platform.model.transformer import Transformer
from nsa_platform.model.weights import (
    CONFIG_FILE,
    CONFIG_KEY,
    FINGERPRINT_KEY,
    ExportError,
    load_config,
    load_model,
)
from nsa_platform.serve.capacity import blocks_per_page_of, check_memory, make_cache, model_len_of
from nsa_platform.serve.decode_graphs import DecodeGraphs
from nsa_platform.serve.engine import Engine
from nsa_platform.serve.ranks import Ranks
from nsa_platform.serve.runner import ModelRunner

log = logging.getLogger(__name__)


def load_engine(
    source_folder: str | Path,
    config: EngineConfig,
    device: torch.device | str,
    ranks: Ranks | None = None,
) -> Engine:
    """The engine of a local folder with config.json, model.safetensors and the tokenizer.

    Args:
        ranks: the tensor_parallel_size ranks that compute the model, of which this is the first.

    Raises:
        ExportError: the folder, its config or its weights are missing, broken or foreign, the
            tokenizer is not the one that belongs to the weights, or they were exported with other
            kernels and identity_mismatch is "error".
        TokenizerError: the folder has no usable tokenizer.
        ValueError: a size of `config` does not fit the model, the memory or the ranks.
    """
    folder = Path(source_folder)
    model_config = check_model(folder, config)
    size = 1 if ranks is None else ranks.axis.size
    if config.tensor_parallel_size != size:
        raise ValueError(
            f"tensor_parallel_size={config.tensor_parallel_size} needs as many ranks, and here "
            f"is {size}: deployments start more"
        )
    # What is cheap to find out comes before the weights.
    tokenizer = Tokenizer(folder)
    recorded = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    _check_tokenizer(folder, tokenizer, model_config.vocab_size, recorded.get(FINGERPRINT_KEY))
    _check_identity(folder, recorded, config.identity_mismatch)
    model = _load(folder, model_config, config, torch.device(device), ranks)
    return make_engine(model, tokenizer, config, ranks)


def make_engine(
    model: Transformer, tokenizer: Tokenizer, config: EngineConfig, ranks: Ranks | None = None
) -> Engine:
    """The engine of a loaded model, with CUDA graphs where the configuration wants them.

    Raises:
        ValueError: as Engine.
    """
    engine = Engine(model, tokenizer, config, ranks)
    if _has_graphs(config, engine.cache.device):
        engine.capture()
    return engine


def load_follower(
    folder: Path, config: EngineConfig, device: torch.device | str, ranks: Ranks
) -> ModelRunner:
    """What a rank that is not the first needs to follow it, from the folder of the engine.

    Raises:
        ExportError, ValueError: as load_engine.
    """
    model = _load(folder, check_model(folder, config), config, torch.device(device), ranks)
    weight = model.embedding.weight
    cache = make_cache(model.config, config, device=weight.device, dtype=weight.dtype, ranks=ranks)
    runner = ModelRunner(model, cache, ranks)
    if _has_graphs(config, cache.device):
        runner.graphs = DecodeGraphs.of(model, cache, config)
    return runner


def check_model(folder: Path, config: EngineConfig) -> ModelConfig:
    """The configuration of an exported model as it is served, before anything of it is loaded.

    Raises:
        ExportError: the folder or its config is missing, broken or foreign.
        ValueError: a size of `config` does not fit the model.
    """
    if not folder.is_dir():
        raise ExportError(f"{folder}: is no folder of an exported model")
    model = config.hf_overrides.of(load_config(folder))
    model_len_of(model, config)
    blocks_per_page_of(model, config)
    share_of(model, config.tensor_parallel_size)
    return model


def _load(
    folder: Path,
    model_config: ModelConfig,
    config: EngineConfig,
    device: torch.device,
    ranks: Ranks | None,
) -> Transformer:
    axis = Axis() if ranks is None else ranks.axis
    dtype = _dtype_of(config, device)
    own = share_of(model_config, axis.size)
    check_memory(own, config, device=device, dtype=dtype)
    model = load_model(folder, model_config, device=device, dtype=dtype, tensor=axis)
    return model.requires_grad_(False)


def _has_graphs(config: EngineConfig, device: torch.device) -> bool:
    return device.type == "cuda" and not config.enforce_eager


def _check_tokenizer(
    folder: Path, tokenizer: Tokenizer, vocab_size: int, recorded: str | None
) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise ExportError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids and the model knows "
            f"{vocab_size}: they do not belong together"
        )
    if recorded not in (None, tokenizer.fingerprint):
        raise ExportError(
            f"{folder}: the model was trained with the tokenizer {recorded} "
            f"({FINGERPRINT_KEY} in {CONFIG_FILE}), and the folder holds {tokenizer.fingerprint}"
        )


def _check_identity(folder: Path, recorded: dict[str, Any], action: str) -> None:
    found = differences(recorded.get(IDENTITY_KEY, {}), recorded[CONFIG_KEY])
    if not found or action == "ignore":
        return
    message = (
        f"{folder}: the model was not computed by what is installed here, and may select other "
        f"blocks than in its training ({'; '.join(found)})"
    )
    if action == "error":
        raise ExportError(f"{message}; identity_mismatch: warn serves it all the same")
    log.warning(message)


def _dtype_of(config: EngineConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }[config.dtype]
