"""The training loop: pretraining and fine-tuning alike, read from top to bottom.

It knows neither Ray nor files. Every worker runs it on the same arguments, and all of them see the
same losses.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_platform import figures
from nsa_platform.config.model import NsaAttentionConfig
from nsa_platform.config.train import TrainConfig
from nsa_platform.data.loader import Batch, Loader
from nsa_platform.model.transformer import Transformer
from nsa_platform.tracking import Tracker
from nsa_platform.train.checkpoint import CheckpointStore
from nsa_platform.train.expert_load import balance_metrics, expert_figures, expert_metrics
from nsa_platform.train.health import health_figures, health_metrics, health_values
from nsa_platform.train.history import History
from nsa_platform.train.loss import chunk_tokens, cross_entropy_sum
from nsa_platform.train.mesh import Mesh
from nsa_platform.train.metrics import StepClock, Throughput, memory_metrics
from nsa_platform.train.optimizer import set_learning_rate
from nsa_platform.train.parallel import World, clip_gradients, sum_replica_gradients
from nsa_platform.train.schedule import learning_rate
from nsa_platform.train.validation import Validated, Validation

Metrics = Mapping[str, float]
Report = Callable[[int, Metrics], None]
"""Told the step and its metrics by every worker alike: whenever something is logged."""


class TrainingDiverged(ArithmeticError):
    """The loss or the gradients are not finite any more; going on would only spread it."""


@dataclass
class Progress:
    """How far the run is."""

    step: int = 0
    """Optimizer steps that are done."""
    tokens: int = 0
    """Tokens that went through the model in them, over all workers."""

    def advance(self, tokens: int) -> None:
        """One more step of `tokens` is done."""
        self.step += 1
        self.tokens += tokens


@dataclass(frozen=True, slots=True)
class StepResult:
    """Sums of one step over all workers, still on the device."""

    nats: Tensor
    targets: Tensor
    balance_loss: Tensor
    grad_norm: Tensor
    expert_load: Tensor
    """int64 [layers with experts, experts]."""


def train(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    *,
    loader: Loader,
    config: TrainConfig,
    world: World,
    mesh: Mesh,
    progress: Progress,
    history: History,
    validation: Validation | None,
    checkpoints: CheckpointStore,
    identity: Mapping[str, Any],
    tracker: Tracker | None,
    throughput: Throughput,
    report: Report,
) -> None:
    """Train from `progress.step` to `config.steps`.

    Args:
        progress, history: advanced in place.
        validation: None if there are no held-out rows.
        identity: what a checkpoint says about its run beside how far it is.
        tracker: only on the first worker.

    Raises:
        TrainingDiverged: on all workers at the same step; that step is in no checkpoint.
    """
    rows_per_step = config.tokens_per_step // loader.config.context_length
    clock = StepClock()
    while progress.step < config.steps:
        rate = learning_rate(progress.step, config=config.optimizer, steps=config.steps)
        set_learning_rate(optimizer, rate)
        with clock.data():
            microbatches = loader.next_step(rows_per_step)
        result = take_step(model, optimizer, microbatches, config=config, world=world, mesh=mesh)
        progress.advance(config.tokens_per_step)
        clock.tick()
        is_last = progress.step == config.steps
        is_saved = is_last or progress.step % config.checkpoint.every_steps == 0
        metrics: dict[str, float] = {}
        if is_saved or progress.step % config.log_every_steps == 0:
            metrics |= read_step(result, progress=progress, model=model)
            metrics |= throughput.metrics(clock) | memory_metrics(world.device)
            metrics |= {"train/lr": rate, "train/tokens": progress.tokens}
            history.add_train(progress.tokens, metrics["train/loss"])
        with clock.pause():
            if validation and (is_last or progress.step % config.validate_every_steps == 0):
                metrics |= validate(
                    model, validation, result, progress=progress, history=history, tracker=tracker
                )
            if metrics:
                if tracker:
                    tracker.log_metrics(metrics, progress.step)
                report(progress.step, metrics)
            if is_saved:
                state = {"loader": loader.state().to_dict(), "history": history.to_dict()}
                facts = {**identity, **asdict(progress), **state, "metrics": metrics}
                checkpoints.save(progress.step, model=model, optimizer=optimizer, facts=facts)
    checkpoints.wait()


def take_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    microbatches: list[Batch],
    *,
    config: TrainConfig,
    world: World,
    mesh: Mesh,
) -> StepResult:
    """One optimizer step from this worker's microbatches.

    Every target of the step weighs the same, wherever it lies: losses are divided by the number of
    targets of all microbatches of all workers before gradients are added up. Workers of the tensor
    axis compute the same loss, each of which counts as a part.
    """
    targets = torch.tensor(
        sum(batch.num_targets for batch in microbatches), dtype=torch.int64, device=world.device
    )
    world.sum(targets)
    targets //= mesh.config.row_workers
    alike = mesh.partition.tensor.size
    weight = 1.0 / (targets.clamp(min=1) * alike)
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    loads: list[Tensor] = []
    chunk = chunk_tokens(model.config.vocab_size)
    for batch in microbatches:
        batch = batch.to(world.device)
        ids, goals = mesh.own_tokens(batch.ids), mesh.own_tokens(batch.targets)
        share = ids.numel() / (config.tokens_per_step * alike)
        hidden, balance, load = model(ids, mesh.inputs(batch))
        loss = cross_entropy_sum(
            hidden, goals, model.output_weight, chunk=chunk, axis=mesh.partition.tensor
        )
        (loss * weight + balance * share).backward()
        sums += torch.stack([loss.detach() / alike, balance.detach() * share])
        loads.append(load)
    sum_replica_gradients(model, world)
    grad_norm = clip_gradients(model, config.optimizer.max_grad_norm, world)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    nats, balance_loss = world.sum(sums)
    expert_load = torch.stack(loads).sum(0)
    if model.config.moe is not None:
        expert_load = world.sum(expert_load) // alike
        model.steer_experts(expert_load)
    return StepResult(nats, targets, balance_loss, grad_norm, expert_load)


def read_step(result: StepResult, *, progress: Progress, model: Transformer) -> dict[str, float]:
    """train/loss, train/grad_norm and, with experts, train/balance_loss; waits for the device.

    Raises:
        TrainingDiverged: one of them is not finite.
    """
    metrics = {
        "train/loss": result.nats.item() / max(1, int(result.targets)),
        "train/grad_norm": result.grad_norm.item(),
    }
    if model.config.moe is not None:
        metrics["train/balance_loss"] = result.balance_loss.item()
        metrics |= balance_metrics(result.expert_load, model.config.moe)
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"{name} is {value} at step {progress.step}; the newest checkpoint lies before it. "
                "A lower learning rate or a longer warm-up may help"
            )
    return metrics


def validate(
    model: Transformer,
    validation: Validation,
    result: StepResult,
    *,
    progress: Progress,
    history: History,
    tracker: Tracker | None,
) -> dict[str, float]:
    """Validate, remember it in the history, draw it; returns its metrics and, with experts, those
    of each expert in the step before it."""
    validated = validation.run(model)
    history.valid.append((progress.tokens, validated.loss))
    history.health.append((progress.step, health_values(validated.health)))
    if tracker:
        draw(tracker, validated, history=history, model=model)
    metrics = validated.metrics() | health_metrics(validated.health)
    if model.config.moe is not None:
        metrics |= expert_metrics(result.expert_load, model.config.moe)
        if tracker:
            for path, figure in expert_figures(result.expert_load, model.config.moe).items():
                tracker.log_figure(figure, path)
    return metrics


def draw(tracker: Tracker, validated: Validated, *, history: History, model: Transformer) -> None:
    """Figures of the run so far and of its newest validation."""
    attention = model.config.attention
    block_size = (
        attention.selection_block_size if isinstance(attention, NsaAttentionConfig) else None
    )
    drawn = health_figures(history.health, validated.health, block_size=block_size)
    drawn["figures/loss.png"] = figures.loss_curve(history.train, history.valid)
    drawn["figures/loss_by_position.png"] = figures.loss_by_position(
        validated.position_edges, validated.position_losses, unit="nats per token"
    )
    for path, figure in drawn.items():
        tracker.log_figure(figure, path)
