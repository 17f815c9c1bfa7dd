"""Files for torch.distributed.checkpoint's reader, wherever storage keeps them."""

import os
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader

from nsa_platform import storage


class StoredFiles(FileSystem):
    """What the reader asks of a file system, for local paths and s3://."""

    def create_stream(self, path: str | os.PathLike, mode: str) -> Any:
        if mode != "rb":
            raise ValueError(f"mode={mode!r}: snapshots are only read through this")
        return storage.open_input(str(path))

    def init_path(self, path: str | os.PathLike) -> str:
        return str(path)

    def concat_path(self, path: str | os.PathLike, suffix: str) -> str:
        return storage.join(str(path), suffix)


def stored_reader(uri: str) -> FileSystemReader:
    """A reader of one snapshot; it reads the byte ranges that this worker needs."""
    reader = FileSystemReader(uri)
    reader.fs = StoredFiles()
    reader.path = reader.fs.init_path(uri)  # pyright: ignore[reportAttributeAccessIssue]
    return reader


def storage_is_away(error: BaseException) -> bool:
    """Whether the storage failed, of any worker: the files may well be sound."""
    if isinstance(error, CheckpointException):
        return any(storage_is_away(each) for each, _ in error.failures.values())
    missing = isinstance(error, storage.MissingFileError)
    return isinstance(error, storage.StorageError) and not missing
