"""The training loop: pretraining and fine-tuning alike, read from top to bottom.

It knows neither Ray nor files. Every worker runs it on the same arguments, and all of them see the
same losses.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn

import torch

from nsa_platform.config.train import TrainConfig
from nsa_platform.data.prefetch import Steps
from nsa_platform.model.transformer import Transformer
from nsa_platform.tracking import Tracker
from nsa_platform.train.checkpoint import CheckpointStore
from nsa_platform.train.expert_load import balance_metrics, expert_figures, expert_metrics
from nsa_platform.train.listeners import Listeners
from nsa_platform.train.mesh import Mesh
from nsa_platform.train.metrics import StepClock, Throughput, memory_metrics
from nsa_platform.train.optimizer import set_learning_rate
from nsa_platform.train.parallel import World
from nsa_platform.train.preemption import Preemption, TrainingPreempted
from nsa_platform.train.progress import Progress
from nsa_platform.train.schedule import Schedule
from nsa_platform.train.snapshots import AWAITS
from nsa_platform.train.step import StepResult, take_step
from nsa_platform.train.validating import validate
from nsa_platform.train.validation import Validation


def train(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    *,
    loader: Steps,
    config: TrainConfig,
    schedule: Schedule,
    world: World,
    mesh: Mesh,
    progress: Progress,
    preemption: Preemption,
    validation: Validation | Literal["asynchronous"] | None,
    checkpoints: CheckpointStore,
    identity: Mapping[str, Any],
    listeners: Listeners,
    throughput: Throughput,
) -> None:
    """Train from `progress.step`, which is advanced in place, to `config.steps`.

    Args:
        validation: None: there are no held-out rows; asynchronous: others validate checkpoints.
        identity: what a checkpoint says about its run beside how far it is.

    Raises:
        TrainingDiverged: the guard has given up; on all workers at the same step.
        TrainingPreempted: a worker must leave and the state is saved; on all workers.
    """
    clock, save_is_due, validation_is_due = StepClock(), False, False
    while progress.step < config.steps:
        set_learning_rate(optimizer, rate := schedule.rate(progress.step))
        with clock.data():
            batches = loader.next_step(config.tokens_per_step // loader.config.context_length)
        result = take_step(
            model, optimizer, batches, config=config, world=world, mesh=mesh, progress=progress
        )
        clock.tick()
        is_last = progress.step == config.steps
        is_leaving = preemption.agreed() and not is_last
        # While steps are skipped nobody knows yet whether the weights are sound.
        save_is_due |= progress.step % config.checkpoint.every_steps == 0
        validates = is_last or progress.step % config.validate_every_steps == 0
        validation_is_due |= validates and validation == "asynchronous"
        is_saved = is_last or is_leaving or (save_is_due and result.skipped is None)
        metrics: dict[str, float] = {}
        if is_saved or validates or result.skipped or progress.step % config.log_every_steps == 0:
            metrics |= read_step(result, progress=progress, model=model, say=listeners.say)
            metrics |= {"train/lr": rate, "train/context_length": loader.config.context_length}
            metrics |= throughput.metrics(clock) | memory_metrics(world.device)
        with clock.pause():
            if validation and validates:
                metrics |= look(model, validation, result, progress, listeners.tracker)
            listeners.tell(progress.step, metrics)
            if is_saved:
                place = {"loader": loader.state().to_dict(), AWAITS: validation_is_due}
                facts = {**identity, **progress.to_dict(), **place, "metrics": metrics}
                checkpoints.save(progress.step, model=model, optimizer=optimizer, facts=facts)
                save_is_due = validation_is_due = False
        if is_leaving:
            _leave(checkpoints, preemption, step=progress.step)
    checkpoints.wait()


def _leave(checkpoints: CheckpointStore, preemption: Preemption, *, step: int) -> NoReturn:
    checkpoints.wait()
    raise TrainingPreempted(f"saved step {step}: {preemption.reasons()}")


def read_step(
    result: StepResult, *, progress: Progress, model: Transformer, say: Callable[[str], None]
) -> dict[str, float]:
    """train/loss, train/grad_norm and, with experts, train/balance_loss, where they are finite;
    and how far the run is. The loss of a step that was taken goes into the history; one that was
    skipped is said."""
    if result.skipped is not None:
        say(f"step {progress.step} was skipped: {result.skipped}")
    else:
        progress.history.add_train(progress.tokens, result.loss)
    metrics = {"train/loss": result.loss, "train/grad_norm": result.grad_norm.item()}
    if model.config.moe is not None:
        metrics["train/balance_loss"] = result.balance_loss.item()
        metrics |= balance_metrics(result.expert_load, model.config.moe)
    metrics |= {"train/tokens": progress.tokens, "train/skipped_steps": progress.guard.skipped}
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def look(
    model: Transformer,
    validation: Validation | Literal["asynchronous"],
    result: StepResult,
    progress: Progress,
    tracker: Tracker | None,
) -> dict[str, float]:
    """Metrics of a step whose model is validated: those of each expert, with figures, and, unless
    others validate, what is found."""
    metrics: dict[str, float] = {}
    if isinstance(validation, Validation):
        metrics |= validate(model, validation, progress, tracker)
    if model.config.moe is not None:
        metrics |= expert_metrics(result.expert_load, model.config.moe)
        if tracker:
            for path, figure in expert_figures(result.expert_load, model.config.moe).items():
                tracker.log_figure(figure, path)
    return metrics
