"""A run small enough for a test: a toy NSA model on toy shards, through the real loop."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nsa_platform.config.data import LoaderConfig
from nsa_platform.config.model import ModelConfig
from nsa_platform.config.train import TrainConfig
from nsa_platform.data.loader import Loader, LoaderState
from nsa_platform.data.manifest import SourceRecord, TokenizerRecord
from nsa_platform.data.shards import ShardWriter, open_split
from nsa_platform.train.build import build_mesh, build_model
from nsa_platform.train.checkpoint import CheckpointStore
from nsa_platform.train.export import gather_weights
from nsa_platform.train.listeners import Listeners
from nsa_platform.train.loop import train
from nsa_platform.train.metrics import Throughput
from nsa_platform.train.optimizer import build_optimizer
from nsa_platform.train.parallel import World
from nsa_platform.train.preemption import Notice, Preemption
from nsa_platform.train.progress import Progress
from nsa_platform.train.schedule import Schedule
from nsa_platform.train.validation import Validation

CONTEXT = 48
VOCAB = 32

MODEL = ModelConfig.parse(
    {
        "vocab_size": VOCAB,
        "layers": 2,
        "width": 24,
        "ffn_width": 32,
        "max_context": CONTEXT,
        "attention": {
            "kind": "nsa",
            "query_heads": 4,
            "kv_heads": 2,
            "key_width": 8,
            "value_width": 8,
            "compression_block_size": 8,
            "compression_stride": 4,
            "selection_block_size": 8,
            "num_selected_blocks": 3,
            "num_initial_blocks": 1,
            "num_local_blocks": 1,
            "window_size": 8,
        },
    }
)
MOE = MODEL.model_copy(
    update={
        "moe": ModelConfig.parse(
            MODEL.model_dump()
            | {"moe": {"routed_experts": 4, "expert_width": 8, "experts_per_token": 2}}
        ).moe
    }
)


def write_data(folder: Path) -> LoaderConfig:
    """Documents that count upwards with a few jumps: learnable in a few steps."""
    rng = np.random.default_rng(0)
    tokenizer = TokenizerRecord(fingerprint="0" * 64, vocab_size=VOCAB, eos_id=0, pad_id=1)
    for split, documents in (("train", 60), ("validation", 8)):
        writer = ShardWriter(
            str(folder / split), kind="text", split=split, tokenizer=tokenizer, shard_tokens=1000
        )
        for _ in range(documents):
            length = int(rng.integers(5, 90))
            ids = (rng.integers(VOCAB) + np.arange(length)) % (VOCAB - 2) + 2
            writer.add([*ids.tolist(), 0], text_bytes=length)
        writer.finish(SourceRecord(files=1, bytes=1, documents=documents))
    return LoaderConfig(path=str(folder), context_length=CONTEXT, seed=3)


def settings(**changes: Any) -> TrainConfig:
    """Six steps of eight rows with all that happens once in a while."""
    return TrainConfig.parse(
        {
            "steps": 6,
            "tokens_per_step": 8 * CONTEXT,
            "sequences_per_microbatch": 2,
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
            "validate_every_steps": 3,
            "validation_tokens": 5 * CONTEXT,
            "checkpoint": {"every_steps": 3},
        }
        | changes
    )


@dataclass
class Recorded:
    """What a run has told."""

    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def losses(self) -> list[float]:
        """train/loss of each step."""
        return [self.metrics[step]["train/loss"] for step in sorted(self.metrics)]


def this_world(device: str = "cpu") -> World:
    """This process in the initialised group."""
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=torch.device(device))


def run(
    config: TrainConfig,
    data: LoaderConfig,
    folder: Path,
    *,
    model_config: ModelConfig = MODEL,
    keep_latest: int = 9,
    device: str = "cpu",
    notice: Notice = lambda: None,
    weights: Path | None = None,
) -> Recorded:
    """Train (or go on training) in `folder`, as a worker does; `weights`: an exported model."""
    recorded, world = Recorded(), this_world(device)
    mesh = build_mesh(model_config, config, context_length=data.context_length, world=world)
    model = build_model(model_config, config, world=world, mesh=mesh, weights=weights)
    optimizer = build_optimizer(model, config.optimizer)
    checkpoints = CheckpointStore(
        str(folder),
        config=config.checkpoint.model_copy(update={"keep_latest": keep_latest}),
        world=world,
        say=recorded.lines.append,
    )
    facts = checkpoints.load(model=model, optimizer=optimizer)
    progress = Progress.from_facts(facts, config.guard)
    state = None if facts is None else LoaderState.from_dict(facts["loader"])
    loader = Loader(
        open_split(data, "train"),
        data,
        rank=mesh.data_rank,
        world_size=mesh.data_size,
        rows_per_microbatch=config.sequences_per_microbatch,
        state=state,
    )
    validation = Validation(
        open_split(data, "validation"),
        data,
        tokens=config.validation_tokens,
        rows_per_microbatch=config.sequences_per_microbatch,
        world=world,
        mesh=mesh,
        token_bytes=torch.arange(VOCAB) % 4,
    )
    train(
        model,
        optimizer,
        loader=loader,
        config=config,
        schedule=Schedule(config.optimizer, start=0, end=config.steps),
        world=world,
        mesh=mesh,
        progress=progress,
        preemption=Preemption(world, notice),
        validation=validation,
        checkpoints=checkpoints,
        identity={},
        listeners=Listeners(
            report=lambda step, metrics: recorded.metrics.update({step: dict(metrics)}),
            say=recorded.lines.append,
        ),
        throughput=Throughput(config.tokens_per_step, 1.0, None),
    )
    checkpoints.close()
    recorded.weights = {name: full(p) for name, p in model.named_parameters()}
    exported = gather_weights(model)
    if world.is_first:
        assert exported.keys() == recorded.weights.keys()
        assert all(exported[name].equal(recorded.weights[name]) for name in exported)
    return recorded


def full(parameter: torch.Tensor) -> torch.Tensor:
    """The whole parameter on the CPU, also of a sharded one."""
    value = parameter.detach()
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value  # pyright: ignore
    return whole.to("cpu", copy=True)
