"""Staged parts into shards of the wanted size: who goes where, and the task that writes one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from nsa_platform import storage
from nsa_platform.data.manifest import ShardRecord
from nsa_platform.data.shard_file import concatenate_rows, shard_name, write_shard


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [start, stop) of one part."""

    part: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class MergeJob:
    """One shard to be made of rows [start, stop) of staged files."""

    folder: str
    split: str
    number: int
    slices: tuple[tuple[str, int, int], ...]
    """Address of a staged file, start, stop."""


@dataclass(frozen=True, slots=True)
class Merged:
    """A shard that was made."""

    split: str
    number: int
    record: ShardRecord


def plan_shards(lengths: Sequence[np.ndarray], shard_tokens: int) -> list[list[Piece]]:
    """Cut a sequence of documents, part by part, into shards of at most `shard_tokens`.

    A document longer than that is a shard of its own.

    Args:
        lengths: for each part the tokens of its documents.
    """
    shards: list[list[Piece]] = []
    room = 0
    for part, part_lengths in enumerate(lengths):
        ends = np.cumsum(part_lengths, dtype=np.int64)
        start, before = 0, 0
        while start < len(ends):
            stop = int(np.searchsorted(ends, before + room, side="right"))
            if stop <= start:
                shards.append([])
                room = shard_tokens
                stop = max(int(np.searchsorted(ends, before + room, side="right")), start + 1)
            shards[-1].append(Piece(part, start, stop))
            room = max(room - (int(ends[stop - 1]) - before), 0)
            start, before = stop, int(ends[stop - 1])
    return shards


def merge_shard(job: MergeJob) -> Merged:
    """Write one shard of rows from staged files. Raises StorageError."""
    batches = [_read_rows(uri).slice(start, stop - start) for uri, start, stop in job.slices]
    record = write_shard(job.folder, shard_name(job.number), concatenate_rows(batches))
    return Merged(job.split, job.number, record)


def _read_rows(uri: str) -> pa.RecordBatch:
    if not storage.is_remote(uri):
        return ipc.open_file(pa.memory_map(str(Path(uri)))).get_batch(0)
    with storage.open_input(uri) as file:
        return ipc.open_file(file).get_batch(0)
