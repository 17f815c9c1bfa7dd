"""Arrow shards of token ids: written once, verified when first opened, read in place.

On disk, under one folder:
    shard-00000.arrow ...  Arrow IPC files of one record batch, memory-mappable; a row is a document
        ids        list<uint32>  token ids, the end token included
        loss_mask  list<bool>    only for chats: true for tokens that the assistant wrote
    manifest.json          written last; vouches for every shard by size and sha256

A shard is hashed once in each process that opens it (over 1 GB/s, 50 ms for 64 MB); after that it
is read in place without a copy. Remote shards are fetched whole into a bounded local cache that is
addressed by their sha256, so a stale copy cannot be used.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np

from nsa_platform import storage
from nsa_platform.config.data import LoaderConfig
from nsa_platform.data.manifest import (
    Kind,
    Manifest,
    ManifestMismatch,
    MissingShard,
    ShardError,
    ShardRecord,
    SourceRecord,
    TokenizerMismatch,
    TokenizerRecord,
    read_manifest,
    write_manifest,
)
from nsa_platform.data.shard_file import (
    count_loss_tokens,
    file_sha256,
    read_shard,
    rows_table,
    shard_name,
    write_shard,
)
from nsa_platform.retry import retried

log = logging.getLogger(__name__)

OPEN_SHARDS = 8
FETCH_DELAYS_S = (1.0, 5.0, 20.0, 60.0, 120.0)
DEFAULT_CACHE_BYTES = 32 << 30


@dataclass(frozen=True, slots=True)
class Shard:
    """An opened shard: flat arrays over its documents."""

    ids: np.ndarray
    """uint32 [tokens], memory-mapped."""
    offsets: np.ndarray
    """int64 [rows + 1]; document i is ids[offsets[i] : offsets[i + 1]]."""
    loss_mask: np.ndarray | None
    """bool [tokens], None if every token counts."""


class ShardWriter:
    """Collects documents into shards of about `shard_tokens`; `finish` writes the manifest.

    Without `finish` the folder has no manifest and so counts as unfinished.
    """

    def __init__(
        self,
        folder: str,
        *,
        kind: Kind,
        split: str,
        tokenizer: TokenizerRecord,
        shard_tokens: int,
    ) -> None:
        self._folder = folder
        self._kind: Kind = kind
        self._split = split
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._ids: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        self._tokens = 0
        self._records: list[ShardRecord] = []
        self._text_bytes = 0
        self._loss_tokens = 0

    def add(
        self, ids: Sequence[int], *, text_bytes: int, loss_mask: Sequence[bool] | None = None
    ) -> None:
        """Append one document; chats need a loss mask, texts have none."""
        if (loss_mask is None) == (self._kind == "chat"):
            raise ShardError(f"kind={self._kind!r}: chats and only chats have a loss_mask")
        if not len(ids):
            raise ShardError("a document needs at least one token")
        if self._ids and self._tokens + len(ids) > self._shard_tokens:
            self._flush()
        self._ids.append(np.asarray(ids, dtype=np.uint32))
        if loss_mask is not None:
            self._masks.append(np.asarray(loss_mask, dtype=bool))
        self._tokens += len(ids)
        self._text_bytes += text_bytes
        self._loss_tokens += count_loss_tokens(self._masks[-1] if self._masks else None, len(ids))

    def finish(self, source: SourceRecord) -> Manifest:
        """Write what is left and the manifest."""
        if self._ids:
            self._flush()
        manifest = Manifest(
            kind=self._kind,
            split=self._split,
            tokenizer=self._tokenizer,
            source=source,
            shards=tuple(self._records),
            text_bytes=self._text_bytes,
            loss_tokens=self._loss_tokens,
        )
        write_manifest(self._folder, manifest)
        return manifest

    def _flush(self) -> None:
        table = rows_table(self._ids, self._masks if self._kind == "chat" else None)
        name = shard_name(len(self._records))
        self._records.append(write_shard(self._folder, name, table))
        self._ids, self._masks, self._tokens = [], [], 0


class ShardSet:
    """The shards of one split, opened when they are needed.

    Args:
        folder: local or s3://, with a manifest.json.
        cache_dir: where remote shards are kept; default: storage.default_cache.
        cache_bytes: least recently used remote shards are deleted beyond this.
        tokenizer_fingerprint: what the shards must have been made with, if given.

    Raises:
        ManifestError: the folder is not finished or its manifest is broken.
        TokenizerMismatch: the shards were made with another tokenizer.
        StorageError: the store cannot be reached.
    """

    def __init__(
        self,
        folder: str,
        *,
        cache_dir: str | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        tokenizer_fingerprint: str | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        made_with = self.manifest.tokenizer.fingerprint
        if tokenizer_fingerprint not in (None, made_with):
            raise TokenizerMismatch(
                f"{folder}: was made with tokenizer {made_with[:12]}, "
                f"but tokenizer {str(tokenizer_fingerprint)[:12]} is given"
            )
        self._cache = Path(cache_dir or storage.default_cache("shards"))
        self._cache_bytes = cache_bytes
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._verified: set[int] = set()
        self._fetches: dict[int, Future[Path]] = {}
        self._fetcher: ThreadPoolExecutor | None = None
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self.manifest.shards)

    def open(self, index: int) -> Shard:
        """Fetch if remote, verify if new to this process, and map a shard.

        Raises:
            MissingShard: the file is not there.
            ManifestMismatch: its size, hash or content is not what the manifest says.
            StorageError: the store cannot be reached.
        """
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        shard = self._map(index, self._local(index))
        self._open[index] = shard
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return shard

    def prefetch(self, index: int) -> None:
        """Begin to fetch a remote shard in the background; a local one needs nothing."""
        if not storage.is_remote(self.folder) or index in self._open:
            return
        with self._lock:
            if index in self._fetches:
                return
            if self._fetcher is None:
                self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="shard-fetch")
            self._fetches[index] = self._fetcher.submit(self._fetch, index)

    def _uri(self, index: int) -> str:
        return storage.join(self.folder, self.manifest.shards[index].name)

    def _local(self, index: int) -> Path:
        if not storage.is_remote(self.folder):
            path = Path(self._uri(index))
            if not path.is_file():
                raise MissingShard(f"{path}: is listed in the manifest but missing")
            if index not in self._verified:
                self._verify(index, path)
            return path
        with self._lock:
            running = self._fetches.pop(index, None)
        path = running.result() if running else self._fetch(index)
        # Another process may have made room between the fetch and now.
        return path if path.exists() else self._fetch(index)

    def _fetch(self, index: int) -> Path:
        record = self.manifest.shards[index]
        path = self._cache / f"{record.sha256}.arrow"
        if _mark_used(path):
            if index in self._verified:
                return path
        else:
            try:
                self._download(index, path)
            except storage.MissingFileError as error:
                raise MissingShard(
                    f"{self._uri(index)}: is listed in the manifest but missing ({error})"
                ) from error
            self._make_room(keep=path)
        try:
            self._verify(index, path)
        except ManifestMismatch:
            path.unlink(missing_ok=True)
            raise
        return path

    def _download(self, index: int, path: Path) -> None:
        """Wait for a store that is away for a while: a shard in time is no reason to stop."""
        uri = self._uri(index)

        def download() -> None:
            storage.download_file(uri, path)

        retried(
            download,
            f"reading {uri}",
            say=log.warning,
            delays_s=FETCH_DELAYS_S,
            final=(storage.MissingFileError,),
        )

    def _verify(self, index: int, path: Path) -> None:
        record = self.manifest.shards[index]
        size = path.stat().st_size
        if size != record.bytes:
            raise ManifestMismatch(
                f"{self._uri(index)}: has {size} bytes, the manifest says {record.bytes}"
            )
        found = file_sha256(path)
        if found != record.sha256:
            raise ManifestMismatch(
                f"{self._uri(index)}: has sha256 {found}, the manifest says {record.sha256}"
            )
        self._verified.add(index)

    def _map(self, index: int, path: Path) -> Shard:
        record, uri = self.manifest.shards[index], self._uri(index)
        batch = read_shard(path)
        ids = batch.column("ids")
        flat = ids.flatten()
        if (batch.num_rows, len(flat)) != (record.rows, record.tokens):
            raise ManifestMismatch(
                f"{uri}: holds {batch.num_rows} rows and {len(flat)} tokens, "
                f"the manifest says {record.rows} and {record.tokens}"
            )
        has_mask = "loss_mask" in batch.schema.names
        if has_mask != (self.manifest.kind == "chat"):
            raise ManifestMismatch(f"{uri}: chats and only chats have a loss_mask")
        ids_flat = flat.to_numpy(zero_copy_only=True)
        vocab_size = self.manifest.tokenizer.vocab_size
        if len(ids_flat) and int(ids_flat.max()) >= vocab_size:
            raise ManifestMismatch(f"{uri}: holds an id beyond the vocabulary of {vocab_size}")
        offsets = ids.offsets.to_numpy().astype(np.int64)
        if not has_mask:
            return Shard(ids_flat, offsets, None)
        mask = batch.column("loss_mask")
        if not mask.offsets.equals(ids.offsets):
            raise ManifestMismatch(f"{uri}: loss_mask and ids differ in length")
        return Shard(ids_flat, offsets, mask.flatten().to_numpy(zero_copy_only=False))

    def _make_room(self, keep: Path) -> None:
        files = sorted(self._cache.glob("*.arrow"), key=_age)
        total = sum(_size(path) for path in files)
        for path in files:
            if total <= self._cache_bytes:
                return
            if path != keep:
                total -= _size(path)
                # Readers that have it mapped keep their view of a deleted file.
                path.unlink(missing_ok=True)


def open_split(
    config: LoaderConfig,
    split: Literal["train", "validation"],
    *,
    tokenizer_fingerprint: str | None = None,
) -> ShardSet:
    """The shards of one split of config.path."""
    return ShardSet(
        storage.join(config.path, split),
        cache_dir=config.cache_dir,
        cache_bytes=int(config.cache_gib * 2**30),
        tokenizer_fingerprint=tokenizer_fingerprint,
    )


def open_mixture(
    config: LoaderConfig, *, tokenizer_fingerprint: str | None = None
) -> list[ShardSet]:
    """The training shards of each further source of a mixture."""
    return [
        open_split(
            config.model_copy(update={"path": source.path}),
            "train",
            tokenizer_fingerprint=tokenizer_fingerprint,
        )
        for source in config.mixture
    ]


def _mark_used(path: Path) -> bool:
    """Whether the cached file is there; if so it is the youngest now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _age(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
