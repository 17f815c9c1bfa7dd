"""The state of a training by name, as checkpoints hold it, and models filled from it."""

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load

from nsa_platform.model.lora import is_adapted
from nsa_platform.train.stored_files import stored_reader


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and the optimizer's moments by parameter name.

    The optimizer's settings (learning rate, decay) are not state: they follow the configuration.
    Beside adapters frozen weights are not state either: they follow the model of the start.
    """
    model_state, optimizer_state = get_state_dict(model, optimizer, options=state_options(model))
    return {"model": model_state, "optimizer": optimizer_state["state"]}


def state_options(model: nn.Module) -> StateDictOptions:
    """Which parameters of the model are state."""
    adapted = is_adapted(model)
    return StateDictOptions(ignore_frozen_params=adapted, strict=not adapted)


def fill_weights(model: nn.Module, uri: str) -> None:
    """Fill a model's weights from a snapshot, and nothing else. All workers of the default process
    group call it.

    Raises:
        StorageError, CheckpointException and what its formats raise: it cannot be read.
    """
    options = state_options(model)
    weights = get_model_state_dict(model, options=options)
    load({"model": weights}, storage_reader=stored_reader(uri))
    set_model_state_dict(model, weights, options=options)
