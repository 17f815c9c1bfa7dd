"""Loss on held-out rows: nats, bits per byte, by position; and the health of the attention."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nsa_platform.config.data import LoaderConfig
from nsa_platform.config.stages import Stage
from nsa_platform.data.loader import Batch, Loader
from nsa_platform.data.shards import ShardSet
from nsa_platform.data.tokenizer import Tokenizer, TokenizerError
from nsa_platform.model.probe import LayerHealth, Probe
from nsa_platform.model.transformer import Transformer
from nsa_platform.train.loss import IGNORED, chunk_tokens, token_losses
from nsa_platform.train.mesh import Mesh
from nsa_platform.train.needles import Needles, open_needles
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
    """Of each layer, over the first microbatches."""

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
        probed: int = 1,
    ) -> None:
        """Read up to `tokens` held-out tokens; `token_bytes` [vocab] gives the bytes of each id.

        samples, needles: prompts to be answered and numbers to be found each time too.
        probed: so many of each worker's first microbatches tell of the attention's health.
        """
        self.samples, self.needles = samples, needles
        self._probed = probed
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
        # For each row: nats, targets and bytes; then nats and targets of each part of the context.
        # Workers with the same tokens add the same to all of them, and only quotients count.
        sums = torch.zeros(
            self.rows, 3 + 2 * self._num_parts, dtype=torch.float64, device=self._world.device
        )
        probe = Probe()
        with torch.no_grad():
            for index, (rows, batch) in enumerate(self._batches()):
                watched = probe if index < self._probed else None
                found = self._measure(model, batch.to(self._world.device), watched)
                sums[rows] += found[: len(rows)]
        release_gathered(model)
        model.train()
        self._world.sum(sums)
        for tensor in probe.tensors():
            self._world.sum(tensor)
        # Exact sums: in whatever order and by however many workers the rows were read.
        return self._read([math.fsum(column) for column in sums.T.tolist()], probe)

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

    def _batches(self) -> Iterator[tuple[list[int], Batch]]:
        """This worker's microbatches, each with the numbers of the rows in it that count; rows that
        only fill up the last ones come after those."""
        loader, dealt = self._loader(), self._mesh.data_size
        unit = self._rows_per_microbatch * dealt
        for first_row in range(0, self.rows, unit):
            for batch in loader.next_step(unit):
                own = range(first_row + self._mesh.data_rank, first_row + unit, dealt)
                yield [row for row in own if row < self.rows], batch

    def _measure(self, model: Transformer, batch: Batch, probe: Probe | None) -> Tensor:
        """float64 [rows of the microbatch, 3 + 2 parts], of this worker's tokens."""
        inputs = dataclasses.replace(self._mesh.inputs(batch), probe=probe)
        ids, targets = self._mesh.own_tokens(batch.ids), self._mesh.own_tokens(batch.targets)
        # A probe looks into every layer, which compiled code does not allow.
        with torch.compiler.set_stance("force_eager" if probe else "default"):
            hidden = model(ids, inputs).hidden
        chunk = chunk_tokens(model.config.vocab_size)
        losses = token_losses(hidden, targets, model.logits, chunk=chunk).double()
        counts = (targets != IGNORED).double()
        num_bytes = torch.zeros_like(counts)
        if self._token_bytes is not None:
            num_bytes = self._token_bytes[targets.clamp(min=0)] * counts
        part = torch.bucketize(inputs.positions.long(), self._inner_edges, right=True)
        is_part = functional.one_hot(part, self._num_parts).double()
        by_part = torch.cat([losses[:, None] * is_part, counts[:, None] * is_part], dim=1)
        values = torch.cat([torch.stack([losses, counts, num_bytes], dim=1), by_part], dim=1)
        whole = values.new_zeros(len(batch.ids), values.shape[1])
        whole[self._mesh.own_tokens(torch.arange(len(batch.ids), device=whole.device))] = values
        return whole.view(self._rows_per_microbatch, -1, values.shape[1]).sum(1)

    def _read(self, sums: list[float], probe: Probe) -> Validated:
        nats, targets, num_bytes, *parts = sums
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


def open_validation(
    stage: Stage,
    shards: ShardSet,
    tokenizer: Tokenizer,
    *,
    world: World,
    mesh: Mesh,
    say: Callable[[str], None],
    probed: int = 1,
) -> Validation:
    """The validation that a stage asks for, on its held-out shards.

    Args:
        probed: as Validation takes it.

    Raises:
        ValueError: a needle's length has no room for needle, question and answer.
    """
    try:
        token_bytes = torch.from_numpy(tokenizer.token_bytes())
    except TokenizerError:
        # Ids of such a tokenizer have no bytes of their own; there is a loss in nats alone.
        token_bytes = None
    samples, asked = None, stage.train.samples
    if asked.num_prompts:
        samples = Samples(shards, tokenizer, asked, world=world, mesh=mesh)
        if len(samples) < asked.num_prompts:
            say(
                f"samples: {len(samples)} held-out prompts of at most "
                f"{asked.max_prompt_tokens} tokens"
            )
    needles = open_needles(
        shards,
        tokenizer,
        stage.train.needle,
        context_length=stage.data.context_length,
        world=world,
        mesh=mesh,
    )
    return Validation(
        shards,
        stage.data,
        tokens=stage.train.validation_tokens,
        rows_per_microbatch=stage.train.sequences_per_microbatch,
        world=world,
        mesh=mesh,
        token_bytes=token_bytes,
        samples=samples,
        needles=needles,
        probed=probed,
    )
