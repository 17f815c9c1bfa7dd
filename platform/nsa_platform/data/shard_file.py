"""One shard file: an Arrow IPC file with one record batch, one row for each document.

Columns: ids list<uint32>, the token ids with the end token included; and for chats loss_mask
list<bool>, true for tokens that the assistant wrote.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from nsa_platform import storage
from nsa_platform.data.manifest import ShardError, ShardRecord

IDS = pa.field("ids", pa.list_(pa.uint32()), nullable=False)
LOSS_MASK = pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False)
HASH_BYTES = 4 << 20


def shard_name(index: int) -> str:
    """File name of the shard with this number."""
    return f"shard-{index:05d}.arrow"


def rows_table(ids: list[np.ndarray], loss_masks: list[np.ndarray] | None) -> pa.Table:
    """A table of documents from one array of ids for each, and their masks for chats."""
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    flat_ids = np.concatenate([np.zeros(0, dtype=np.uint32), *ids])
    if loss_masks is None:
        return _table(lengths, flat_ids, None)
    return _table(lengths, flat_ids, np.concatenate([np.zeros(0, dtype=bool), *loss_masks]))


def concatenate_rows(batches: Sequence[pa.RecordBatch]) -> pa.Table:
    """One table of the rows of several batches, which may be slices."""

    def flat(name: str) -> np.ndarray:
        columns = [batch.column(name).flatten() for batch in batches]
        return np.concatenate([column.to_numpy(zero_copy_only=False) for column in columns])

    lengths = [np.diff(batch.column("ids").offsets.to_numpy()) for batch in batches]
    has_mask = "loss_mask" in batches[0].schema.names
    return _table(np.concatenate(lengths), flat("ids"), flat("loss_mask") if has_mask else None)


def write_shard(folder: str, name: str, table: pa.Table) -> ShardRecord:
    """Write documents as one shard, atomically, and return what the manifest says of it."""
    with storage.writing(storage.join(folder, name)) as path:
        with pa.OSFile(str(path), "wb") as sink, ipc.new_file(sink, table.schema) as writer:
            for batch in table.combine_chunks().to_batches() or [_no_rows(table.schema)]:
                writer.write_batch(batch)
        return ShardRecord(
            name=name,
            rows=table.num_rows,
            tokens=len(table.column("ids").combine_chunks().flatten()),
            bytes=path.stat().st_size,
            sha256=file_sha256(path),
        )


def read_shard(path: Path) -> pa.RecordBatch:
    """The one record batch of a local shard file, memory-mapped.

    Raises:
        ShardError: the file is not an Arrow file of one batch with the shards' columns.
    """
    try:
        reader = ipc.open_file(pa.memory_map(str(path)))
        if reader.num_record_batches != 1:
            raise ShardError(f"{path}: holds {reader.num_record_batches} record batches, not 1")
        batch = reader.get_batch(0)
        batch.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{path}: is not a readable Arrow file: {error}") from error
    if batch.schema not in (pa.schema([IDS]), pa.schema([IDS, LOSS_MASK])):
        raise ShardError(f"{path}: has columns {batch.schema.names}, not ids (and loss_mask)")
    return batch


def file_sha256(path: Path) -> str:
    """sha256 of a local file, in hex."""
    result = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_BYTES):
            result.update(chunk)
    return result.hexdigest()


def count_loss_tokens(loss_mask: np.ndarray | None, length: int) -> int:
    """Targets of one document read whole: all but its first token, or the masked ones of these."""
    return max(length - 1, 0) if loss_mask is None else int(loss_mask[1:].sum())


def _table(lengths: np.ndarray, ids: np.ndarray, loss_mask: np.ndarray | None) -> pa.Table:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if offsets[-1] >= 2**31:
        raise ShardError(f"{offsets[-1]} tokens do not fit into one shard, the limit is 2^31 - 1")
    starts = pa.array(offsets, pa.int32())
    columns = [pa.ListArray.from_arrays(starts, pa.array(ids, pa.uint32()))]
    if loss_mask is None:
        return pa.table(columns, schema=pa.schema([IDS]))
    columns.append(pa.ListArray.from_arrays(starts, pa.array(loss_mask, pa.bool_())))
    return pa.table(columns, schema=pa.schema([IDS, LOSS_MASK]))


def _no_rows(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)
