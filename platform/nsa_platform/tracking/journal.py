"""What is still to be delivered, on disk: one JSON line for each entry, one file for each writer.

Under one queue folder:
    <time>-<id>.jsonl   first line: the run's handle; then entries in the order they were made
    blobs/<id>/<name>   files that an entry wants uploaded
    rejected.jsonl      entries that the store refused for good, with its reason

A writer holds an advisory lock on its file while it lives; the lock ends with the process,
however that ends. A file without a lock is an orphan: whoever attaches next adopts and delivers it.
Delivery is safe to repeat, so the file is emptied only after everything in it has arrived and no
note is kept of how far delivery came.
"""

import errno
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from nsa_platform.tracking.handle import RunHandle

Entry = dict[str, Any]
"""`kind` (metrics, params, tags, file, table, dataset, status), `time_ms`, and the kind's own."""

REJECTED_FILE = "rejected.jsonl"


class Journal:
    """One locked file of entries. Not safe for threads: its owner guards it."""

    def __init__(self, path: Path, descriptor: int, handle: RunHandle) -> None:
        self.path = path
        self.handle = handle
        self._descriptor: int | None = descriptor
        self._header = _line({"kind": "handle", "handle": handle.to_dict()})

    @classmethod
    def create(cls, handle: RunHandle) -> Self:
        """A new, empty, locked journal in the handle's queue folder."""
        folder = Path(handle.queue_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.jsonl"
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        journal = cls(path, descriptor, handle)
        journal._write(journal._header)
        return journal

    @classmethod
    def adopt(cls, path: Path) -> Self | None:
        """Lock an orphan; None if its writer lives, it is gone or it holds nothing."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        first = next(_read(path), None)
        if first is None or first.get("kind") != "handle":
            path.unlink(missing_ok=True)
            os.close(descriptor)
            return None
        return cls(path, descriptor, RunHandle.from_dict(first["handle"]))

    def append(self, entry: Entry) -> None:
        """Write one line at once; what a killed process has appended survives it.

        Raises:
            OSError: the disk is full; the journal is as it was before.
        """
        self._write(_line(entry))

    def _write(self, line: bytes) -> None:
        if self._descriptor is None:
            raise ValueError(f"{self.path}: the journal is closed")
        size = os.fstat(self._descriptor).st_size
        if os.write(self._descriptor, line) < len(line):
            os.ftruncate(self._descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def entries(self) -> list[Entry]:
        """All entries after the handle; a torn last line of a killed writer is left out."""
        return [entry for entry in _read(self.path) if entry.get("kind") != "handle"]

    def clear(self) -> None:
        """Forget all entries (they have been delivered) and their files."""
        if self._descriptor is None:
            return
        for entry in self.entries():
            drop_blob(entry)
        os.ftruncate(self._descriptor, len(self._header))

    def close(self, *, delete: bool) -> None:
        """Release the lock; `delete` when nothing is left to deliver."""
        if self._descriptor is None:
            return
        if delete:
            self.clear()
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None


def orphans(queue_dir: Path) -> Iterator[Journal]:
    """Adopt every journal whose writer is gone, oldest first."""
    for path in sorted(queue_dir.glob("*.jsonl")):
        if path.name == REJECTED_FILE:
            continue
        journal = Journal.adopt(path)
        if journal is not None:
            yield journal


def keep_blob(queue_dir: Path, name: str) -> Path:
    """A fresh path under the queue folder whose last part is `name`; the caller writes the file."""
    folder = queue_dir / "blobs" / uuid.uuid4().hex
    folder.mkdir(parents=True)
    return folder / name


def drop_blob(entry: Entry) -> None:
    """Delete the file of an entry, if it has one."""
    if "blob" in entry:
        shutil.rmtree(Path(entry["blob"]).parent, ignore_errors=True)


def note_rejected(queue_dir: Path, entry: Entry, reason: str) -> None:
    """Keep an entry that the store will never take, with the store's reason."""
    with (queue_dir / REJECTED_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"reason": reason, "entry": entry}) + "\n")


def points(entry: Entry) -> int:
    """How many things an entry delivers: its metric values, or one."""
    return len(entry["values"]) if entry["kind"] == "metrics" else 1


def _line(entry: Entry) -> bytes:
    return (json.dumps(entry) + "\n").encode()


def _read(path: Path) -> Iterator[Entry]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(entry, dict):
                yield entry
