"""One rank's share of a model that several ranks serve together: its heads, its hidden units.

Key/value heads are dealt with the query heads that read them, for these choose their blocks
together; hidden units of feed-forward layers are dealt too. Queries, keys, values, gates and the
first half of a feed-forward layer need no message; what leaves attention and feed-forward is a
part of a sum over ranks. Embedding, head, norms and router are whole on every rank.

Training shares work in the same way, but with whole weights on each worker (partition.py).

Source: Megatron-LM, arXiv 1909.08053, section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor

from nsa_platform.config.model import ModelConfig, MoeConfig, NsaAttentionConfig
from nsa_platform.model.exchange import total
from nsa_platform.model.layers import RowParallelLinear, SwiGlu
from nsa_platform.model.moe import MoeFeedForward
from nsa_platform.model.partition import WHOLE, Axis, Partition
from nsa_platform.model.transformer import Layer, Transformer


@dataclass(frozen=True, slots=True)
class Cut:
    """How a parameter is dealt: along one axis, of each section of it a part to each rank."""

    dim: int
    sections: tuple[int, ...]

    def own(self, axis: Axis) -> list[slice]:
        """This rank's parts, in order."""
        slices, start = [], 0
        for section in self.sections:
            part = axis.own(section)
            slices.append(slice(start + part.start, start + part.stop))
            start += section
        return slices


def share_of(config: ModelConfig, size: int) -> ModelConfig:
    """The model that each of `size` ranks computes.

    Raises:
        ValueError: the model cannot be dealt to so many.
    """
    if size == 1:
        return config
    attention, moe = config.attention, config.moe
    if attention.kind not in ("nsa", "full"):
        raise ValueError(
            f"tensor_parallel_size={size}: attention.kind={attention.kind} cannot be dealt to "
            "ranks, nsa and full can"
        )
    if attention.kv_heads % size:
        raise ValueError(
            f"tensor_parallel_size={size} must divide the model's kv_heads={attention.kv_heads}: "
            "the heads of a group select their blocks together"
        )
    widths = {"ffn_width": config.ffn_width}
    if moe is not None:
        widths["moe.expert_width"] = moe.expert_width
    for name, width in widths.items():
        if width % size:
            raise ValueError(f"tensor_parallel_size={size} must divide the model's {name}={width}")
    heads = {
        "query_heads": attention.query_heads // size,
        "kv_heads": attention.kv_heads // size,
    }
    changes = {
        "attention": attention.model_copy(update=heads),
        "ffn_width": config.ffn_width // size,
    }
    if moe is not None:
        changes["moe"] = moe.model_copy(update={"expert_width": moe.expert_width // size})
    return config.model_copy(update=changes)


def cut_of(name: str, shape: Sequence[int], config: ModelConfig) -> Cut | None:
    """How the parameter of this name and whole shape is dealt; None: every rank has all of it."""
    if fnmatch(name, "*.attention.key_value.*"):
        return Cut(0, _key_value_sections(config))
    for pattern, dim, num_sections in _CUTS:
        if fnmatch(name, pattern):
            return Cut(dim, (shape[dim] // num_sections,) * num_sections)
    return None


# Pattern, the axis that is cut, and how many sections it has; gate and up are two.
_CUTS = (
    ("*.attention.query.*", 0, 1),
    ("*.attention.gate.*", 0, 1),
    ("*.attention.compress_*", 0, 1),
    ("*.attention.output.weight", 1, 1),
    ("*.experts.gate_up", 2, 2),
    ("*.experts.down", 1, 1),
    ("*.gate_up.weight", 0, 2),
    ("*.down.weight", 1, 1),
)


def _key_value_sections(config: ModelConfig) -> tuple[int, ...]:
    attention = config.attention
    separate = isinstance(attention, NsaAttentionConfig) and attention.branch_kv == "separate"
    branches = 3 if separate else 1
    keys, values = (
        attention.kv_heads * attention.key_width,
        attention.kv_heads * attention.value_width,
    )
    return (*[keys] * branches, *[values] * branches)


class SharedMoe(MoeFeedForward):
    """Experts of whose hidden units each rank has some: one sum for routed and shared ones."""

    def __init__(self, width: int, own: MoeConfig, axis: Axis) -> None:
        super().__init__(width, own)
        self.axis = axis

    def forward(self, x: Tensor, partition: Partition = WHOLE) -> tuple[Tensor, Tensor, Tensor]:
        out, balance_loss, load = super().forward(x, partition)
        return total(out, self.axis), balance_loss, load


def rank_model(config: ModelConfig, axis: Axis) -> Transformer:
    """This rank's model on the meta device, for inference.

    Args:
        config: of the whole model.

    Raises:
        ValueError: as share_of.
    """
    own = share_of(config, axis.size)
    with torch.device("meta"):
        model = Transformer(own)
        if axis.size == 1:
            return model
        for layer in model.layers:
            assert isinstance(layer, Layer)
            attention = layer.attention
            attention.output = RowParallelLinear(attention.output.in_features, own.width, axis)
            if isinstance(layer.ffn, SwiGlu):
                layer.ffn.down = RowParallelLinear(own.ffn_width, own.width, axis)
            else:
                assert own.moe is not None
                layer.ffn = SharedMoe(own.width, own.moe, axis)
    return model
