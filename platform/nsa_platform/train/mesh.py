"""The workers of a run as a mesh: who shares rows, tokens, heads, experts and the state.

Ranks count through the axes replicate, shard, context, tensor; the last turns fastest, so that
workers which exchange the most are neighbours. Experts are shared by neighbours too, whatever else
those share.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nsa_platform.config.mesh import MeshConfig
from nsa_platform.config.model import ModelConfig
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.partition import WHOLE, Axis, Partition


class Rows(Protocol):
    """A batch of packed rows."""

    @property
    def positions(self) -> Tensor: ...
    @property
    def cu_seqlens(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Mesh:
    """This worker's place in the mesh."""

    config: MeshConfig
    data_rank: int
    """Which rows this worker gets, of the data_size ways that rows are dealt."""
    data_size: int
    partition: Partition = WHOLE
    state: DeviceMesh | None = None
    """Where parameters are sharded and, if there are copies, replicated; None: every worker has
    all of them."""
    expert_state: DeviceMesh | None = None
    """The same for routed experts, without the workers that share them."""
    experts: DeviceMesh | None = None
    """The workers that share routed experts; None: nobody shares."""

    def own_tokens(self, tokens: Tensor) -> Tensor:
        """This worker's part of something that has an entry for each packed token."""
        return tokens[self.partition.context.own(len(tokens))]

    def inputs(self, batch: Rows) -> PackedInputs:
        """What this worker's forward pass needs of whole rows."""
        positions = self.own_tokens(batch.positions)
        return PackedInputs(positions, batch.cu_seqlens, partition=self.partition)


def alone(rank: int = 0, size: int = 1) -> Mesh:
    """Workers that differ in their rows alone, each with the whole state."""
    return Mesh(MeshConfig(), rank, size)


def make_mesh(
    config: MeshConfig, model: ModelConfig, *, context_length: int, shards: bool, device_type: str
) -> Mesh:
    """The mesh of the initialised default group. All workers call it.

    Args:
        context_length: tokens of a row.
        shards: whether the state is sharded; if not, the config must be plain.

    Raises:
        ValueError: these workers cannot form it, or the model cannot be shared so.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    problems = config.world_problems(size, context_length) or config.model_problems(model)
    if problems:
        raise ValueError("; ".join(problems))
    if not shards:
        return alone(rank, size)
    copies, experts = config.data_parallel_replicate_degree, config.expert_parallel_degree
    names, sizes = ("replicate", "shard", "expert"), (copies, size // copies // experts, experts)
    by_expert = init_device_mesh(device_type, sizes, mesh_dim_names=names)
    whole = init_device_mesh(
        device_type, (copies, size // copies), mesh_dim_names=("replicate", "shard")
    )
    return Mesh(
        config,
        data_rank=rank // config.row_workers,
        data_size=config.data_workers(size),
        partition=_partition(config, model, size, by_expert),
        state=whole if copies > 1 else whole["shard"],
        expert_state=by_expert["replicate", "shard"] if copies > 1 else by_expert["shard"],
        experts=by_expert["expert"] if experts > 1 else None,
    )


def _partition(
    config: MeshConfig, model: ModelConfig, size: int, by_expert: DeviceMesh
) -> Partition:
    context, tensor = config.context_parallel_degree, config.tensor_parallel_degree
    own_groups = model.attention.kv_heads // tensor
    ranks = torch.arange(size).view(-1, context, tensor).transpose(1, 2)  # [rows, tensor, context]
    kin = max(1, context // own_groups)
    return Partition(
        context=_axis(ranks.reshape(-1, context)),
        kin=_axis(ranks.reshape(-1, kin)),
        tensor=_axis(ranks.transpose(1, 2).reshape(-1, tensor)),
        expert=_axis_of(by_expert.get_group("expert")),
    )


def _axis(groups: Tensor) -> Axis:
    """This worker's axis, of the groups of ranks [groups, workers of each]."""
    if groups.shape[1] == 1:
        return Axis()
    everyone: Iterable[list[int]] = groups.tolist()
    group, _ = dist.new_subgroups_by_enumeration(list(everyone))
    assert isinstance(group, dist.ProcessGroup)
    return _axis_of(group)


def _axis_of(group: dist.ProcessGroup) -> Axis:
    return Axis(group.rank(), group.size(), group.group_name)
