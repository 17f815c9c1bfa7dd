"""The manifest: what a folder of shards holds, and the hashes that vouch for it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from nsa_platform import storage

MANIFEST = "manifest.json"
VERSION = 1

Kind = Literal["text", "chat"]


class ShardError(ValueError):
    """Shards cannot be used. The message names the file and what is wrong with it."""


class ManifestError(ShardError):
    """There is no manifest, or it is malformed or altered."""


class ManifestMismatch(ShardError):
    """A shard's size, hash or content is not what the manifest says."""


class MissingShard(ShardError):
    """A shard that the manifest lists is not there."""


class TokenizerMismatch(ShardError):
    """The shards were made with another tokenizer."""


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One shard file."""

    name: str
    rows: int
    """Documents or chats."""
    tokens: int
    bytes: int
    """Size of the file."""
    sha256: str


@dataclass(frozen=True, slots=True)
class TokenizerRecord:
    """The tokenizer that made the ids."""

    fingerprint: str
    vocab_size: int
    eos_id: int
    pad_id: int


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """The raw corpus, both splits together."""

    files: int
    bytes: int
    """Size of the files as they lie there."""
    documents: int
    """Documents or chats that became rows."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Documents that became no row, by reason."""
    replaced_utf8: int = 0
    """Documents whose invalid bytes became U+FFFD."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """One split: its shards and where they come from. Equal content gives an equal digest."""

    kind: Kind
    split: str
    tokenizer: TokenizerRecord
    source: SourceRecord
    shards: tuple[ShardRecord, ...]
    text_bytes: int
    """UTF-8 bytes of the documents' text (of all messages for chats)."""
    loss_tokens: int
    """Tokens that count as targets when their document is read whole."""

    @property
    def rows(self) -> int:
        """Documents or chats of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens of all shards, end tokens included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def digest(self) -> str:
        """sha256 of the manifest's canonical JSON, in hex."""
        text = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in manifest.json."""
        return {**self._content(), "digest": self.digest}

    def _content(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            **asdict(self),
            "shards": [asdict(shard) for shard in self.shards],
            "rows": self.rows,
            "tokens": self.tokens,
        }


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Write manifest.json: from here on the folder counts as complete."""
    text = json.dumps(manifest.to_dict(), indent=2) + "\n"
    storage.write_text(storage.join(folder, MANIFEST), text)


def read_manifest(folder: str) -> Manifest:
    """Read and check manifest.json.

    Raises:
        ManifestError: it is missing (the folder was not finished), malformed, of another version,
            or altered after it was written.
        StorageError: the store cannot be reached.
    """
    uri = storage.join(folder, MANIFEST)
    try:
        tree = json.loads(storage.read_text(uri))
    except storage.MissingFileError as error:
        raise ManifestError(f"{uri}: is missing, so the folder holds no finished shards") from error
    except ValueError as error:
        raise ManifestError(f"{uri}: is not JSON: {error}") from error
    if not isinstance(tree, dict) or tree.get("version") != VERSION:
        version = tree.get("version") if isinstance(tree, dict) else None
        raise ManifestError(f"{uri}: version must be {VERSION}, got {version!r}")
    try:
        manifest = Manifest(
            kind=tree["kind"],
            split=tree["split"],
            tokenizer=TokenizerRecord(**tree["tokenizer"]),
            source=SourceRecord(**tree["source"]),
            shards=tuple(ShardRecord(**shard) for shard in tree["shards"]),
            text_bytes=tree["text_bytes"],
            loss_tokens=tree["loss_tokens"],
        )
        altered = manifest.to_dict() != tree
    except (KeyError, TypeError) as error:
        raise ManifestError(f"{uri}: is malformed: {error}") from error
    if altered:
        raise ManifestError(f"{uri}: was altered, its digest or totals do not fit its content")
    if manifest.kind not in get_args(Kind):
        raise ManifestError(f"{uri}: kind must be text or chat, got {manifest.kind!r}")
    return manifest
