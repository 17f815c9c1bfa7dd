"""One optimizer step: losses and gradients of all microbatches of all workers, judged and taken."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_platform.config.train import TrainConfig
from nsa_platform.data.loader import Batch
from nsa_platform.model.transformer import Transformer
from nsa_platform.train.loss import chunk_tokens, cross_entropy_sum
from nsa_platform.train.mesh import Mesh
from nsa_platform.train.parallel import World, clip_gradients, sum_replica_gradients
from nsa_platform.train.progress import Progress


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step gave, over all workers."""

    loss: float
    """Nats per target."""
    balance_loss: Tensor
    grad_norm: Tensor
    expert_load: Tensor
    """int64 [layers with experts, experts]."""
    skipped: str | None
    """Why the optimizer did not take the step; None if it did."""


def take_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    microbatches: list[Batch],
    *,
    config: TrainConfig,
    world: World,
    mesh: Mesh,
    progress: Progress,
) -> StepResult:
    """The next optimizer step from this worker's microbatches, if the guard lets it pass.

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
        share = 0.0 if batch.is_blank else ids.numel() / (config.tokens_per_step * alike)
        hidden, balance, load = model(ids, mesh.inputs(batch))
        loss = cross_entropy_sum(
            hidden, goals, model.output_weight, chunk=chunk, axis=mesh.partition.tensor
        )
        (loss * weight + balance * share).backward()
        sums += torch.stack([loss.detach() / alike, balance.detach() * share])
        loads.append(load)
    sum_replica_gradients(model, world)
    grad_norm = clip_gradients(model, config.optimizer.max_grad_norm, world)
    nats, balance_loss = world.sum(sums)
    expert_load = torch.stack(loads).sum(0)
    loss = nats.item() / max(1, int(targets))
    progress.advance(config.tokens_per_step)
    skipped = progress.guard.judge(progress.step, loss=loss, grad_norm=grad_norm.item())
    if skipped is None:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if model.config.moe is not None:
        expert_load = world.sum(expert_load) // alike
        # Beside adapters the choice of experts is frozen.
        if skipped is None and config.lora is None:
            model.steer_experts(expert_load)
    return StepResult(loss, balance_loss, grad_norm, expert_load, skipped)
