"""What selection finds: the attention that chosen blocks hold, beside the best blocks there are.

For a query the true attention is the softmax over all keys of the selected branch that it may see,
a mean over the heads of its group, added up by selection block. Exact-Top with blocks (arXiv
2502.11089, 4.2, at the granularity of 4.1) takes the n blocks that hold most of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nsa_kernels import NsaConfig, compressed_attention, select_blocks
from nsa_platform.config.model import NsaAttentionConfig
from nsa_platform.model.compression import kernel_config
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.probe import Probe
from nsa_platform.model.rotary import attention_scale
from nsa_platform.model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class LayerRecall:
    """Of one layer, means over queries and groups."""

    chosen: float
    """Share of the true attention that the chosen blocks hold."""
    best: float
    """The same of as many blocks that hold most."""
    forced: float
    """The same of the initial and the local blocks alone."""

    @property
    def recall(self) -> float:
        """What the choice finds of what could be found."""
        return self.chosen / self.best


@dataclass(frozen=True, slots=True)
class Mechanism:
    """What a model's selection does on one text."""

    layers: dict[int, LayerRecall]
    gates: dict[int, dict[str, float]]
    """Of each layer and branch, a mean over the text's tokens and heads."""
    maps: dict[int, Tensor]
    """Of each layer, on the CPU, float32 [queries, blocks]: true attention, a mean over groups."""
    queries: Tensor
    """int64 [queries]: the positions that were looked at."""


@torch.no_grad()
def look(model: Transformer, ids: Tensor, *, queries: int) -> Mechanism:
    """Read one text and compare at `queries` positions in its second half, in equal steps.

    Args:
        ids: int64 [T] on the model's device.

    Raises:
        ValueError: the model has no selection, or the text is no longer than what n blocks hold.
    """
    attention = model.config.attention
    if not isinstance(attention, NsaAttentionConfig):
        raise ValueError(f"attention.kind must be nsa, got {attention.kind}: nothing is selected")
    held = attention.num_selected_blocks * attention.selection_block_size
    if len(ids) <= 2 * held:
        raise ValueError(
            f"{len(ids)} tokens must be more than {2 * held}, twice what num_selected_blocks="
            f"{attention.num_selected_blocks} hold: otherwise there is little to choose"
        )
    count = min(queries, len(ids) // 2)
    back = torch.arange(count, device=ids.device).flip(0) * (len(ids) // 2 // count)
    places = len(ids) - 1 - back
    config, scale = kernel_config(attention), attention_scale(model.config)
    layers: dict[int, LayerRecall] = {}
    maps: dict[int, Tensor] = {}

    def watch(layer: int, q: Tensor, k_cmp: Tensor, k_slc: Tensor) -> None:
        mass = block_mass(q[places], k_slc, places, block=config.selection_block_size, scale=scale)
        lse = compressed_attention(q, k_cmp, k_cmp, config=config, scale=scale)[1]
        blocks = select_blocks(q, k_cmp, lse, config=config, scale=scale)[places]
        layers[layer] = recall_of(mass, blocks, places, config)
        maps[layer] = mass.mean(1).cpu()

    probe = Probe(watch)
    model(ids, PackedInputs.from_lengths([len(ids)], device=ids.device, probe=probe))
    gates = {layer: health.gate_mean for layer, health in probe.summary().items()}
    return Mechanism(layers, gates, maps, places.cpu())


def block_mass(q: Tensor, keys: Tensor, places: Tensor, *, block: int, scale: float) -> Tensor:
    """True attention of queries by selection block, a mean over the heads of a group.

    Args:
        q: [Q, H, K], queries at the positions `places` [Q].
        keys: [T, G, K].
        block: tokens of a selection block.

    Returns:
        float32 [Q, G, blocks]; each row adds up to 1.
    """
    num_queries, heads, width = q.shape
    num_tokens, groups, _ = keys.shape
    grouped = q.float().view(num_queries, groups, heads // groups, width)
    scores = torch.einsum("qgrk,tgk->qgrt", grouped, keys.float()) * scale
    hidden = torch.arange(num_tokens, device=q.device) > places[:, None]  # [Q, T]
    shares = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1).mean(2)
    padding = -num_tokens % block
    return functional.pad(shares, (0, padding)).unflatten(-1, (-1, block)).sum(-1)


def recall_of(mass: Tensor, blocks: Tensor, places: Tensor, config: NsaConfig) -> LayerRecall:
    """What chosen blocks hold of `mass` [Q, G, blocks].

    Args:
        blocks: int [Q, G, n], -1 where there are fewer.
        places: int [Q], positions of the queries.
    """
    chosen = torch.where(blocks >= 0, mass.gather(-1, blocks.clamp(min=0).long()), 0.0).sum(-1)
    best = mass.topk(min(config.num_selected_blocks, mass.shape[-1]), dim=-1).values.sum(-1)
    own = (places // config.selection_block_size)[:, None]
    number = torch.arange(mass.shape[-1], device=mass.device)
    is_local = (number <= own) & (number > own - config.num_local_blocks)
    is_forced = is_local | (number < config.num_initial_blocks)
    forced = (mass * is_forced[:, None]).sum(-1)
    return LayerRecall(*(float(each.mean()) for each in (chosen, best, forced)))
