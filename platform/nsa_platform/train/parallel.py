"""Several workers, one model: sharded (FSDP2) or replicated, with the same mathematics.

Both ways add up the gradients of all workers; the loss of each microbatch has already been divided
by the number of targets of the whole step, so the sum is the gradient of the step's mean loss, for
any number of workers and microbatches, and whatever they share within a row (model/partition.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from nsa_platform.config.train import TrainConfig
from nsa_platform.model.experts import Experts
from nsa_platform.model.transformer import Transformer
from nsa_platform.train.mesh import Mesh

# Gradients of replicas travel together up to this many elements.
BUCKET_ELEMENTS = 1 << 25


@dataclass(frozen=True, slots=True)
class World:
    """This worker among all workers."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the worker that logs and writes what is written once."""
        return self.rank == 0

    def of_first(self, values: Tensor) -> Tensor:
        """The first worker's values, in place; on every worker the same."""
        if self.size > 1:
            dist.broadcast(values, src=0)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all workers, in place; on every worker the same."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


def resolve_parallel(config: TrainConfig, *, on_gpu: bool) -> Literal["replicate", "shard"]:
    """auto: shard on a GPU, when computing in bfloat16 or with a mesh, else replicate."""
    if config.parallel != "auto":
        return config.parallel
    shards = on_gpu or config.dtype == "bfloat16" or not config.mesh.is_plain
    return "shard" if shards else "replicate"


def shard(model: Transformer, *, dtype: torch.dtype, mesh: Mesh) -> None:
    """FSDP2: one group of parameters for each layer, one for the rest, one for experts that are
    spread over workers.

    Parameters, gradients after reduction and optimizer state are float32 and sharded; layers
    compute in `dtype`. Needs an initialised process group, also for one worker.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    # Nothing casts or gathers what steers the choice of experts: it is small and must stay exact.
    steering = {p for name, p in model.named_parameters() if name.endswith(".balance_bias")}
    if mesh.experts is not None:
        for module in model.modules():
            if isinstance(module, Experts):
                spread(module, mesh.experts)
                fully_shard(
                    module,
                    mesh=mesh.expert_state,
                    mp_policy=policy,
                    shard_placement_fn=_inside_experts(mesh.expert_state),
                )
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh.state, mp_policy=policy, ignored_params=steering)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sum instead of mean over workers, by a plain sum that every back end knows.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def spread(experts: Experts, mesh: DeviceMesh) -> None:
    """Leave this worker its part of the experts, on the meta device still."""
    for name, parameter in list(experts.named_parameters()):
        shape = (parameter.shape[0] // mesh.size(), *parameter.shape[1:])
        part = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
        whole = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
        experts.register_parameter(name, nn.Parameter(whole, parameter.requires_grad))


def _inside_experts(mesh: DeviceMesh | None) -> Callable[[nn.Parameter], Shard]:
    """Workers may be more than experts: cut inside them where that comes out even."""
    assert mesh is not None
    workers = mesh.size(mesh.ndim - 1)

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(1 if parameter.shape[1] % workers == 0 else 0)

    return place


def fill_parameters(model: nn.Module, value_of: Callable[[str, torch.Size], Tensor]) -> None:
    """Give every parameter its value by name and full shape; of a sharded one, this worker's part.

    Only one full parameter is held at a time, and no message passes between workers.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = value_of(name, parameter.shape)
            if isinstance(parameter, DTensor):
                part = distribute_tensor(
                    value.to(parameter.device),
                    parameter.device_mesh,
                    parameter.placements,
                    src_data_rank=None,
                )
                parameter.to_local().copy_(part.to_local())
            else:
                parameter.copy_(value)


def release_gathered(model: nn.Module) -> None:
    """Give back parameters that a forward pass without a backward pass has gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def sum_replica_gradients(model: nn.Module, world: World) -> None:
    """Add up the gradients of replicas; sharded models have done it in their backward pass.

    A parameter that no token reached (an idle expert) counts as zero, so all workers always
    exchange the same tensors.
    """
    if world.size == 1 or isinstance(model, FSDPModule):
        return
    bucket: list[Tensor] = []
    elements = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        elements += parameter.grad.numel()
        if elements >= BUCKET_ELEMENTS:
            _sum_together(bucket)
            bucket, elements = [], 0
    if bucket:
        _sum_together(bucket)


def _sum_together(gradients: list[Tensor]) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()


def clip_gradients(model: nn.Module, max_norm: float, world: World) -> Tensor:
    """Scale all gradients so that their global norm is at most `max_norm`.

    Returns the norm before clipping as a plain scalar tensor, the same on every worker.
    """
    by_copies: dict[int, list[Tensor]] = {}
    for parameter in model.parameters():
        gradient = parameter.grad
        if gradient is not None:
            part = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            by_copies.setdefault(num_copies(gradient, world.size), []).append(part)
    square = torch.stack(
        [nn.utils.get_total_norm(parts).square() / n for n, parts in by_copies.items()]
    ).sum()
    norm = world.sum(square).sqrt()
    shrink = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parts in by_copies.values():
        torch._foreach_mul_(parts, shrink)  # pyright: ignore[reportPrivateImportUsage]
    return norm


def num_copies(tensor: Tensor, num_workers: int) -> int:
    """Workers that hold the same part of a tensor."""
    if not isinstance(tensor, DTensor):
        return num_workers
    mesh = tensor.device_mesh
    cuts = [mesh.size(i) for i, each in enumerate(tensor.placements) if each.is_shard()]
    return num_workers // math.prod(cuts)
