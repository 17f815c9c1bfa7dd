"""An engine from the folder of an exported model."""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from nsa_platform.config.serve import EngineConfig
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.model.identity import IDENTITY_KEY, differences
from nsa_platform.model.weights import (
    CONFIG_FILE,
    CONFIG_KEY,
    FINGERPRINT_KEY,
    ExportError,
    load_config,
    load_model,
)
from nsa_platform.serve.capacity import blocks_per_page_of, model_len_of
from nsa_platform.serve.engine import Engine

log = logging.getLogger(__name__)


def load_engine(
    source_folder: str | Path, config: EngineConfig, device: torch.device | str
) -> Engine:
    """The engine of a local folder with config.json, model.safetensors and the tokenizer.

    Raises:
        ExportError: the folder, its config or its weights are missing, broken or foreign, the
            tokenizer is not the one that belongs to the weights, or they were exported with other
            kernels and identity_mismatch is "error".
        TokenizerError: the folder has no usable tokenizer.
        ValueError: a size of `config` does not fit the model or the memory.
    """
    folder = Path(source_folder)
    if not folder.is_dir():
        raise ExportError(f"{folder}: is no folder of an exported model")
    # What is cheap to find out comes before the weights.
    model_config = config.hf_overrides.of(load_config(folder))
    tokenizer = Tokenizer(folder)
    recorded = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    _check_tokenizer(folder, tokenizer, model_config.vocab_size, recorded.get(FINGERPRINT_KEY))
    _check_identity(folder, recorded, config.identity_mismatch)
    model_len_of(model_config, config)
    blocks_per_page_of(model_config, config)
    place = torch.device(device)
    model = load_model(folder, model_config, device=place, dtype=_dtype_of(config, place))
    engine = Engine(model.requires_grad_(False), tokenizer, config)
    if place.type == "cuda" and not config.enforce_eager:
        engine.capture()
    return engine


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
