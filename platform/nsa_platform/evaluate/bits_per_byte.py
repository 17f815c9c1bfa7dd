"""Bits per byte of held-out text, overall and by position in the context.

Bits per byte = nats of all targets / ln 2 / bytes of the same targets. The first token of a piece
has no context and is not a target; an end-of-document token is one, and stands for no byte. Any
scorer of the same batches is judged on the same tokens in the same unit.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nsa_platform.data.loader import Batch, Loader
from nsa_platform.data.packing import IGNORED
from nsa_platform.evaluate.scores import Score


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums over some targets."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float | None:
        """None if the targets have no byte."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    @property
    def nats_per_token(self) -> float | None:
        return self.nats / self.tokens if self.tokens else None


@dataclass(frozen=True, slots=True)
class BitsPerByte:
    """What one scorer makes of a text."""

    total: Tally
    edges: tuple[int, ...]
    """Positions where the parts of the context begin, and the end of the last."""
    parts: tuple[Tally, ...]
    """By the number of tokens of the same piece that stand before the predicted one, less one."""


def first_batches(loader: Loader, *, tokens: int, batch_rows: int) -> Iterator[Batch]:
    """Batches of an epoch's first rows, at least one row, until `tokens` tokens are read."""
    wanted = max(1, tokens // loader.config.context_length)
    rows = min(wanted, loader.rows_per_epoch)
    for _ in range(rows // batch_rows):
        yield from loader.next_step(batch_rows)
    if rows % batch_rows:
        rest = Loader(loader.shards, loader.config, state=loader.state())
        yield from itertools.chain.from_iterable(
            rest.next_step(1) for _ in range(rows % batch_rows)
        )


def bits_per_byte(
    scorers: dict[str, Score],
    batches: Iterator[Batch],
    token_bytes: np.ndarray,
    *,
    context_length: int,
    buckets: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[str, BitsPerByte]:
    """Judge every scorer on the same batches.

    Args:
        token_bytes: int [vocab], UTF-8 bytes that each id stands for.
        buckets: equal parts of the context that are summed separately.
        advance: called with the tokens of each batch when it is done.

    Raises:
        ValueError: there are more buckets than positions, or no batch has a target.
    """
    if buckets > context_length:
        raise ValueError(
            f"position_buckets={buckets} must not exceed context_length={context_length}"
        )
    edges = tuple(math.ceil(i * context_length / buckets) for i in range(buckets + 1))
    counts = np.zeros((2, buckets), dtype=np.int64)
    nats = {name: np.zeros(buckets) for name in scorers}
    for batch in batches:
        targets = batch.targets.numpy()
        counted = targets != IGNORED
        part = batch.positions.numpy()[counted].astype(np.int64) * buckets // context_length
        counts[0] += np.bincount(part, minlength=buckets)
        lengths = token_bytes[targets[counted]].astype(np.float64)
        counts[1] += np.bincount(part, lengths, minlength=buckets).astype(np.int64)
        for name, score in scorers.items():
            nats[name] += np.bincount(part, score(batch)[counted], minlength=buckets)
        advance(len(targets))
    if not counts[0].sum():
        raise ValueError("the held-out text has no token to predict")
    return {
        name: BitsPerByte(_tally(sums, counts), edges, _tallies(sums, counts))
        for name, sums in nats.items()
    }


def _tallies(nats: np.ndarray, counts: np.ndarray) -> tuple[Tally, ...]:
    columns: Sequence[tuple[float, int, int]] = list(zip(nats, *counts, strict=True))
    return tuple(Tally(float(n), int(tokens), int(size)) for n, tokens, size in columns)


def _tally(nats: np.ndarray, counts: np.ndarray) -> Tally:
    tokens, size = counts.sum(1)
    return Tally(float(nats.sum()), int(tokens), int(size))
