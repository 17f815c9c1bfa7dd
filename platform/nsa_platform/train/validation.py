"""Loss on held-out rows: nats, bits per byte, by position; and the health of the attention."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_platform.config.data import LoaderConfig
from nsa_platform.data.loader import Batch, Loader
from nsa_platform.data.shards import ShardSet
from nsa_platform.model.probe import LayerHealth, Probe
from nsa_platform.model.transformer import Transformer
from nsa_platform.train.loss import IGNORED, chunk_tokens, token_losses
from nsa_platform.train.mesh import Mesh
from nsa_platform.train.needles import Needles
from nsa_platform.train.parallel import World, release_gathered
from nsa_platform.train.samples import Samples

FIRST_PART = 16
"""Positions of the first part of the context; each further part reaches twice as far."""


@dataclass(frozen=True, slots=True)
class Validated:
    """What one validation found."""

    loss: float
    """Nats per target."""
    bits_per_byte: float | None
    """None if the tokenizer's ids have no fixed bytes."""
    position_edges: list[int]
    """Positions where the parts of the context begin, and the end of the last: powers of two, the
    same whatever the context, but for the end."""
    position_losses: list[float | None]
    """Nats per target in each part; None where there is no target."""
    health: dict[int, LayerHealth]
    """Of each layer, over the first microbatch of every worker."""

    def metrics(self) -> dict[str, float]:
        """valid/loss, valid/bits_per_byte, and valid/loss_at/<end> of each part of the context, by
        the position where it ends."""
        metrics = {"valid/loss": self.loss}
        for end, loss in zip(self.position_edges[1:], self.position_losses, strict=True):
            if loss is not None:
                metrics[f"valid/loss_at/{end}"] = loss
        if self.bits_per_byte is not None:
            metrics["valid/bits_per_byte"] = self.bits_per_byte
        return metrics


class Validation:
    """The same held-out rows each time, whatever the number of workers."""

    def __init__(
        self,
        shards: ShardSet,
        config: LoaderConfig,
        *,
        tokens: int,
        rows_per_microbatch: int,
        world: World,
        mesh: Mesh,
        token_bytes: Tensor | None,
        samples: Samples | None = None,
        needles: Needles | None = None,
    ) -> None:
        """Read up to `tokens` held-out tokens; `token_bytes` [vocab] gives the bytes of each id.

        samples, needles: prompts to be answered and numbers to be found each time too.
        """
        self.samples, self.needles = samples, needles
        self._shards = shards
        self._config = config
        self._rows_per_microbatch = rows_per_microbatch
        self._world = world
        self._mesh = mesh
        self._token_bytes = None if token_bytes is None else token_bytes.to(world.device).double()
        self._edges = position_edges(config.context_length)
        self._inner_edges = torch.tensor(self._edges[1:-1], device=world.device)
        available = self._loader().rows_per_epoch
        self.rows = min(max(1, tokens // config.context_length), available)

    def run(self, model: Transformer) -> Validated:
        """Validate. Every worker calls it; all get the same numbers."""
        model.eval()
        # Nats, targets and bytes; then nats and targets of each part of the context. Workers with
        # the same tokens add the same to all of them, and only quotients count.
        sums = torch.zeros(3 + 2 * self._num_parts, dtype=torch.float64, device=self._world.device)
        probe = Probe()
        with torch.no_grad():
            for index, batch in enumerate(self._batches()):
                self._add(sums, model, batch.to(self._world.device), probe if not index else None)
        release_gathered(model)
        model.train()
        self._world.sum(sums)
        for tensor in probe.tensors():
            self._world.sum(tensor)
        return self._read(sums, probe)

    @property
    def _num_parts(self) -> int:
        return len(self._edges) - 1

    def _loader(self) -> Loader:
        return Loader(
            self._shards,
            self._config,
            rank=self._mesh.data_rank,
            world_size=self._mesh.data_size,
            rows_per_microbatch=self._rows_per_microbatch,
        )

    def _batches(self) -> Iterator[Batch]:
        """This worker's microbatches; rows that only fill up the last ones have no targets."""
        loader = self._loader()
        unit = self._rows_per_microbatch * self._mesh.data_size
        length = self._config.context_length
        for first_row in range(0, self.rows, unit):
            for batch in loader.next_step(unit):
                targets = batch.targets.view(self._rows_per_microbatch, length)
                for i in range(self._rows_per_microbatch):
                    row = first_row + i * self._mesh.data_size + self._mesh.data_rank
                    if row >= self.rows:
                        targets[i] = IGNORED
                yield dataclasses.replace(batch, targets=targets.view(-1))

    def _add(self, sums: Tensor, model: Transformer, batch: Batch, probe: Probe | None) -> None:
        inputs = dataclasses.replace(self._mesh.inputs(batch), probe=probe)
        ids, targets = self._mesh.own_tokens(batch.ids), self._mesh.own_tokens(batch.targets)
        # A probe looks into every layer, which compiled code does not allow.
        with torch.compiler.set_stance("force_eager" if probe else "default"):
            hidden = model(ids, inputs).hidden
        chunk = chunk_tokens(model.config.vocab_size)
        losses = token_losses(hidden, targets, model.logits, chunk=chunk).double()
        has_target = targets != IGNORED
        counts = has_target.double()
        sums[0] += losses.sum()
        sums[1] += counts.sum()
        if self._token_bytes is not None:
            sums[2] += (self._token_bytes[targets.clamp(min=0)] * counts).sum()
        part = torch.bucketize(inputs.positions.long(), self._inner_edges, right=True)
        sums[3 : 3 + self._num_parts].index_add_(0, part, losses)
        sums[3 + self._num_parts :].index_add_(0, part, counts)

    def _read(self, sums: Tensor, probe: Probe) -> Validated:
        nats, targets, num_bytes, *parts = sums.tolist()
        by_position = zip(parts[: self._num_parts], parts[self._num_parts :], strict=True)
        return Validated(
            loss=nats / max(targets, 1.0),
            bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else None,
            position_edges=self._edges,
            position_losses=[total / count if count else None for total, count in by_position],
            health=probe.summary(),
        )


def position_edges(context_length: int) -> list[int]:
    """Where the parts of a context begin, and its end: 0, 16, 32, 64, ..."""
    edges, edge = [0], FIRST_PART
    while edge < context_length:
        edges.append(edge)
        edge *= 2
    return [*edges, context_length]
