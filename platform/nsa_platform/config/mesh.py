"""The device mesh of a training run: how many workers share each kind of work."""

from pydantic import PositiveInt

from nsa_platform.config.base import Strict
from nsa_platform.config.model import ModelConfig


class MeshConfig(Strict):
    """Degrees of the mesh's axes. What they leave over of all workers is the shard degree: FSDP2.

    Every axis is checked against the number of workers and, but for replicate, against the model.
    """

    data_parallel_replicate_degree: PositiveInt = 1
    """Copies of the sharded state (HSDP): gradients are reduced within a copy first, then over
    copies. Put a copy on one node, and only sums of gradients cross between nodes."""
    context_parallel_degree: PositiveInt = 1
    """Workers that share the tokens of one row. Attention meets all tokens with a part of the
    heads; everything else has a part of the tokens."""
    tensor_parallel_degree: PositiveInt = 1
    """Workers that share heads by key/value group, hidden units and the vocabulary."""
    expert_parallel_degree: PositiveInt = 1
    """Workers that share the routed experts, out of those that one copy of the state has."""

    @property
    def row_workers(self) -> int:
        """Workers that work on the same rows."""
        return self.context_parallel_degree * self.tensor_parallel_degree

    @property
    def is_plain(self) -> bool:
        """Whether workers differ in their rows alone and keep one copy of the state."""
        return self == MeshConfig()

    def data_workers(self, num_workers: int) -> int:
        """How many ways rows are dealt."""
        return num_workers // self.row_workers

    def describe(self, num_workers: int) -> str:
        """The axes that share something, as a person would write them; empty if there are none."""
        degrees = {
            "replicate": self.data_parallel_replicate_degree,
            "context": self.context_parallel_degree,
            "tensor": self.tensor_parallel_degree,
            "expert": self.expert_parallel_degree,
        }
        shared = [f"{name} {degree}" for name, degree in degrees.items() if degree > 1]
        copies = self.data_parallel_replicate_degree
        return ", ".join([*shared, f"state over {num_workers // copies}"]) if shared else ""

    def world_problems(self, num_workers: int, context_length: int) -> list[str]:
        """Why so many workers cannot form this mesh for such rows; empty when they can."""
        copies, experts = self.data_parallel_replicate_degree, self.expert_parallel_degree
        unit = copies * self.row_workers
        if num_workers % unit:
            return [
                f"num_workers={num_workers} must be a multiple of "
                f"data_parallel_replicate_degree={copies} x "
                f"context_parallel_degree={self.context_parallel_degree} x "
                f"tensor_parallel_degree={self.tensor_parallel_degree} = {unit}"
            ]
        if (num_workers // copies) % experts:
            return [
                f"expert_parallel_degree={experts} must divide the {num_workers // copies} "
                f"workers of one copy of the state"
            ]
        if context_length % self.row_workers:
            return [
                f"context_length={context_length} must be a multiple of context_parallel_degree x "
                f"tensor_parallel_degree = {self.row_workers}"
            ]
        return []

    def model_problems(self, model: ModelConfig) -> list[str]:
        """Why a model cannot be shared in this way; empty when it can."""
        return [
            *self._head_problems(model),
            *self._width_problems(model),
            *self._expert_problems(model),
        ]

    def _head_problems(self, model: ModelConfig) -> list[str]:
        context, tensor = self.context_parallel_degree, self.tensor_parallel_degree
        heads, groups = model.attention.query_heads, model.attention.kv_heads
        if groups % tensor:
            return [
                f"tensor_parallel_degree={tensor} must divide kv_heads={groups}: the heads of a "
                "group select their blocks together"
            ]
        own = groups // tensor
        fits = own % context == 0 or (context % own == 0 and (heads // tensor) % context == 0)
        if not fits:
            return [
                f"context_parallel_degree={context} must divide the {own} key/value heads of a "
                f"worker, or be a multiple of them that divides its {heads // tensor} query heads"
            ]
        return []

    def _width_problems(self, model: ModelConfig) -> list[str]:
        tensor = self.tensor_parallel_degree
        widths = {"model.ffn_width": model.ffn_width, "model.vocab_size": model.vocab_size}
        if model.moe is not None:
            shared = model.moe.shared_experts * model.moe.expert_width
            widths["model.moe.shared_experts x expert_width"] = shared
        return [
            f"tensor_parallel_degree={tensor} must divide {name}={width}"
            for name, width in widths.items()
            if width % tensor
        ]

    def _expert_problems(self, model: ModelConfig) -> list[str]:
        degree = self.expert_parallel_degree
        experts = 0 if model.moe is None else model.moe.routed_experts
        if degree > 1 and (not experts or experts % degree):
            return [
                f"expert_parallel_degree={degree} must divide model.moe.routed_experts={experts}"
            ]
        return []
