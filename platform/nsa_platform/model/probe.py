"""Health of the sparse attention: gates, where the selected blocks lie, how sharp the scores are.

A probe is handed to a forward pass and adds up sums on the device; nothing travels to the host
until summary(). It costs a second pass over the compressed branch and keeps torch.compile out, so
it belongs in validation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_kernels import NsaConfig, compressed_attention, select_blocks
from nsa_platform.model.adaptive import keep_top_p

NSA_BRANCHES = ("cmp", "slc", "win")
FULL_BRANCHES = ("full",)
DISTANCE_BUCKETS = 24


@dataclass(frozen=True, slots=True)
class LayerHealth:
    """What a probe saw of one layer."""

    gate_mean: dict[str, float]
    """Mean gate of each branch, over tokens and heads."""
    selected_distance: list[float]
    """Share of the selected blocks by distance from the query's own block: bucket 0 is the own
    block, bucket k holds distances of [2^(k-1), 2^k) blocks. Empty for full attention."""
    selection_entropy: float | None
    """Entropy of the attention over compressed blocks, from which blocks are selected, as a share
    of the largest possible: 0 one block, 1 all alike. None for full attention, or when no query
    had two blocks to choose from."""
    selected_blocks: float | None = None
    """Mean number of blocks that a group reads for a query. None for full attention."""


Watch = Callable[[int, Tensor, Tensor, Tensor], None]
"""Layer, q [T, H, K], compressed keys [C, G, K] and selected keys [T, G, K], all rotated."""


@dataclass(slots=True)
class _Sums:
    gates: Tensor
    tokens: Tensor
    distances: Tensor
    choices: Tensor
    entropy: Tensor
    entropy_count: Tensor


class Probe:
    """Adds up the health of each layer over any number of forward passes.

    No dataclass: hooks around layers (FSDP's) hand on copies of those, and a copy's sums are lost.
    """

    def __init__(self, watch: Watch | None = None) -> None:
        """watch: is shown the queries and keys of each layer that selects."""
        self.layers: dict[int, _Sums] = {}
        self.watch = watch

    def tensors(self) -> list[Tensor]:
        """The running sums, layer by layer, to be added in place over the ranks of a job."""
        return [
            tensor
            for _, sums in sorted(self.layers.items())
            for tensor in (
                sums.gates,
                sums.tokens,
                sums.distances,
                sums.choices,
                sums.entropy,
                sums.entropy_count,
            )
        ]

    def summary(self) -> dict[int, LayerHealth]:
        """What was seen, by layer. The only place that waits for the device."""
        return {layer: _read(sums) for layer, sums in sorted(self.layers.items())}


@torch.no_grad()
def observe_gates(probe: Probe, layer: int, gates: Tensor) -> None:
    """Add the gates [T, H, branches] of a layer."""
    sums = _sums_of(probe, layer, gates)
    sums.gates += gates.double().mean(1).sum(0)
    sums.tokens += gates.shape[0]


@torch.no_grad()
def observe_selection(
    probe: Probe,
    layer: int,
    q: Tensor,
    k_cmp: Tensor,
    *,
    gates: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    config: NsaConfig,
    scale: float,
    top_p: float | None = None,
) -> None:
    """Add what a layer selects for queries q [T, H, K] among k_cmp [C, G, K].

    top_p: the share that adaptive n keeps; None: a query reads all that is chosen.
    """
    observe_gates(probe, layer, gates)
    sums = probe.layers[layer]
    # With the keys as values the branch returns the mean key, and with it the mean score:
    # entropy = lse - mean score, without ever holding the scores.
    mean_key, lse = compressed_attention(
        q, k_cmp, k_cmp, config=config, cu_seqlens=cu_seqlens, scale=scale
    )
    sizes = {"config": config, "cu_seqlens": cu_seqlens, "scale": scale}
    blocks = select_blocks(q, k_cmp, lse, **sizes)
    if top_p is not None:
        blocks = keep_top_p(blocks, q, k_cmp, lse, top_p=top_p, positions=positions, **sizes)

    distance = positions[:, None, None] // config.selection_block_size - blocks
    bucket = torch.frexp(distance.double()).exponent.long().clamp(max=DISTANCE_BUCKETS - 1)
    is_block = (blocks >= 0).flatten().long()
    sums.distances.index_add_(0, bucket.flatten() * is_block, is_block)
    sums.choices += blocks.shape[0] * blocks.shape[1]

    stride, size = config.compression_stride, config.compression_block_size
    visible = ((positions[:, None] + 1 - size) // stride + 1).clamp(min=0)
    mean_score = scale * (q.double() * mean_key.double()).sum(-1)
    entropy = (lse.double() - mean_score) / visible.double().log()
    has_choice = (visible >= 2).expand_as(entropy)
    sums.entropy += torch.where(has_choice, entropy, 0.0).sum()
    sums.entropy_count += has_choice.sum()


def _sums_of(probe: Probe, layer: int, gates: Tensor) -> _Sums:
    if layer not in probe.layers:
        real = {"dtype": torch.float64, "device": gates.device}
        whole = {"dtype": torch.int64, "device": gates.device}
        probe.layers[layer] = _Sums(
            gates=torch.zeros(gates.shape[2], **real),
            tokens=torch.zeros((), **whole),
            distances=torch.zeros(DISTANCE_BUCKETS, **whole),
            choices=torch.zeros((), **whole),
            entropy=torch.zeros((), **real),
            entropy_count=torch.zeros((), **whole),
        )
    return probe.layers[layer]


def _read(sums: _Sums) -> LayerHealth:
    branches = NSA_BRANCHES if len(sums.gates) == len(NSA_BRANCHES) else FULL_BRANCHES
    gates = (sums.gates / sums.tokens.clamp(min=1)).tolist()
    counts: list[int] = sums.distances.tolist()
    while counts and not counts[-1]:
        counts.pop()
    entropies = int(sums.entropy_count)
    return LayerHealth(
        gate_mean=dict(zip(branches, gates, strict=True)),
        selected_distance=[count / sum(counts) for count in counts],
        selected_blocks=sum(counts) / int(sums.choices) if int(sums.choices) else None,
        selection_entropy=float(sums.entropy) / entropies if entropies else None,
    )
