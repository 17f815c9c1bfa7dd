"""The model of a run on this worker: parallel as asked, compiled as asked, filled with weights."""

import gc
from pathlib import Path

import torch
from torch import Tensor

from nsa_platform.config.model import ModelConfig
from nsa_platform.config.train import TrainConfig
from nsa_platform.model.transformer import Layer, Transformer, initial_tensor
from nsa_platform.model.weights import load_model
from nsa_platform.train.adapters import adapt
from nsa_platform.train.mesh import Mesh, make_mesh
from nsa_platform.train.parallel import (
    World,
    fill_parameters,
    resolve_parallel,
    shard,
)
from nsa_platform.train.recompute import compile_layers, recompute_activations

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def forget_earlier_models(train: TrainConfig) -> None:
    """Give back what an earlier model of this process has held, and compile layers anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if train.compile:
        torch.compiler.reset()


def build_mesh(
    config: ModelConfig, train: TrainConfig, *, context_length: int, world: World
) -> Mesh:
    """The mesh that the run asks for. All workers call it.

    Args:
        context_length: tokens of a row.

    Raises:
        ValueError: these workers cannot form it, or the model cannot be shared so.
    """
    shards = resolve_parallel(train, on_gpu=world.device.type != "cpu") == "shard"
    return make_mesh(
        train.mesh,
        config,
        context_length=context_length,
        shards=shards,
        device_type=world.device.type,
    )


def build_model(
    config: ModelConfig,
    train: TrainConfig,
    *,
    world: World,
    mesh: Mesh,
    weights: Path | None = None,
) -> Transformer:
    """Build on the meta device, cut into shards, fill: no worker ever holds more than its part.

    The weights do not depend on the number of workers nor on how they share the model.

    Args:
        mesh: as build_mesh made it.
        weights: exported model to start from; None: initial weights by train.seed. Adapters
            (train.lora) begin by train.seed either way.
    """
    with torch.device("meta"):
        model = Transformer(config)
        if train.lora is not None:
            adapt(model, train.lora)
    if train.lora is not None and train.lora.dropout:
        # Workers have other tokens and leave out other inputs; a checkpoint keeps the state.
        torch.manual_seed(train.seed + world.rank)
    layers = [layer for layer in model.layers if isinstance(layer, Layer)]
    recompute_activations(layers, train.activation_checkpointing)
    if train.compile:
        compile_layers(layers)
    if mesh.state is not None:
        shard(model, dtype=DTYPES[train.dtype], mesh=mesh)
    model.to_empty(device=world.device)
    state = {} if weights is None else load_model(weights).state_dict()

    def value_of(name: str, shape: torch.Size) -> Tensor:
        if name in state:
            return state[name]
        return initial_tensor(config, name, shape, seed=train.seed)

    fill_parameters(model, value_of)
    return model.train()
