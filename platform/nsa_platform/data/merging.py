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
    """Rows [start, stop) of those that are left of one part."""

    part: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class MergeJob:
    """One shard to be made of rows of staged files."""

    folder: str
    split: str
    number: int
    slices: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]
    """Address of a staged file, and ranges [start, stop) of its rows."""


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


def row_ranges(piece: Piece, rows: np.ndarray | None) -> tuple[tuple[int, int], ...]:
    """The rows of a staged file that a piece stands for, as ranges [start, stop).

    Args:
        rows: of the file that are left, int64, ascending; None: all of them.
    """
    if rows is None:
        return ((piece.start, piece.stop),)
    chosen = rows[piece.start : piece.stop]
    runs = np.split(chosen, np.flatnonzero(np.diff(chosen) != 1) + 1)
    return tuple((int(run[0]), int(run[-1]) + 1) for run in runs)


def merge_shard(job: MergeJob) -> Merged:
    """Write one shard of rows from staged files. Raises StorageError."""
    batches = [
        rows.slice(start, stop - start)
        for uri, ranges in job.slices
        for rows in (_read_rows(uri),)
        for start, stop in ranges
    ]
    record = write_shard(job.folder, shard_name(job.number), concatenate_rows(batches))
    return Merged(job.split, job.number, record)


def _read_rows(uri: str) -> pa.RecordBatch:
    if not storage.is_remote(uri):
        return ipc.open_file(pa.memory_map(str(Path(uri)))).get_batch(0)
    with storage.open_input(uri) as file:
        return ipc.open_file(file).get_batch(0)
