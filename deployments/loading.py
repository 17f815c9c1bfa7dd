"""From a model's configuration to its engine: find it, fetch it, load it, or say why not."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from deployments.config import LLMConfig, ModelLoadingConfig
from deployments.followers import Followers
from nsa_platform import storage
from nsa_platform.data import tokenizer as tokenizer_files
from nsa_platform.serve.engine import Engine
from nsa_platform.serve.loading import check_model, load_engine
from nsa_platform.tracking import fetch_model, is_model_reference

TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"


class StartError(RuntimeError):
    """A model cannot be served. One line: which model, and what is wrong with what."""


def start_engine(config: LLMConfig, followers: Followers | None = None) -> tuple[Engine, Path]:
    """The engine of a model on this process's device, and the model's local folder.

    followers: the other ranks of a model that several compute; they are started.

    Raises:
        StartError: anything is missing, unreachable, foreign or does not fit together.
    """
    loading = config.model_loading_config
    try:
        folder = find_model(loading)
        with _with_tokenizer(folder, loading.tokenizer_source) as whole:
            check_model(whole, config.engine_kwargs)
            device = device_of(config)
            ranks = None if followers is None else followers.meet(folder)
            engine = load_engine(whole, config.engine_kwargs, device, ranks)
        engine.warm_up()
        engine.calibrate()
        return engine, folder
    except (ValueError, OSError, RuntimeError) as error:
        # One rank's failure ends what the others are at: its own reason is the one to tell.
        told = None if followers is None else followers.problem()
        reason = " ".join((told or str(error)).split())
        raise StartError(f"model {loading.model_id!r} cannot be served: {reason}") from None


def find_model(config: ModelLoadingConfig) -> Path:
    """Local folder of the model, downloaded if it is elsewhere.

    Raises:
        ValueError: models:/ is named and no registry.
        OSError: it cannot be found or fetched.
    """
    source = config.model_source
    cache = storage.default_cache("models")
    if not is_model_reference(source):
        return storage.fetch(source, cache)
    uri = config.tracking_uri or os.environ.get(TRACKING_VARIABLE)
    if uri is None:
        raise ValueError(
            f"model_source={source} lies in a registry: name it by "
            f"model_loading_config.tracking_uri or {TRACKING_VARIABLE}"
        )
    return fetch_model(source, uri, cache)


@contextmanager
def _with_tokenizer(folder: Path, source: str | None) -> Iterator[Path]:
    """The model's folder, or a view of it in which another tokenizer lies beside the weights."""
    if source is None:
        yield folder
        return
    other = storage.fetch(source, storage.default_cache("files"))
    with tempfile.TemporaryDirectory(prefix="nsa-model-") as temporary:
        for path in folder.iterdir():
            if path.name not in tokenizer_files.FILES:
                Path(temporary, path.name).symlink_to(path.resolve())
        for path in other.iterdir():
            if path.name in tokenizer_files.FILES:
                Path(temporary, path.name).symlink_to(path.resolve())
        yield Path(temporary)


def device_of(config: LLMConfig) -> str:
    """Where each rank of the model computes. Raises ValueError if there is no such device."""
    if config.num_gpus == 0:
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError(
            f"the replica has {config.num_gpus:g} GPUs by its configuration, and torch sees none"
        )
    return "cuda"
