"""One part of a corpus, tokenised: what a single task does, and the record that it did it.

A finished part leaves, in the staging folder, an Arrow file for each split and then its record. The
names carry the part's fingerprint: settings, tokenizer, and path, size and time of every file. A
record with the right name therefore means that the work is done and nothing has changed.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from nsa_platform import storage
from nsa_platform.config.data import CorpusConfig, DeduplicateConfig
from nsa_platform.data.chat import ChatError, check_messages, render_chat
from nsa_platform.data.corpus import Part
from nsa_platform.data.documents import Problems, read_documents
from nsa_platform.data.fingerprints import signature, text_hash
from nsa_platform.data.prints import Documents, write_prints
from nsa_platform.data.shard_file import count_loss_tokens, rows_table, write_shard
from nsa_platform.data.tokenizer import Tokenizer, open_tokenizer

SPLITS = ("train", "validation")
ENCODE_CHARACTERS = 1 << 20
RECORD = ".npz"


@dataclass(frozen=True, slots=True)
class PartJob:
    """All that a task needs to know."""

    part: Part
    fingerprint: str
    corpus: CorpusConfig
    tokenizer: str
    """Folder of the tokenizer."""
    staging: str
    """Folder of the results."""
    cache_dir: str
    validation_fraction: float
    deduplicate: DeduplicateConfig | None
    """What the fingerprints of the documents are to tell; None: there are none."""


@dataclass(slots=True)
class SplitRecord:
    """What a part gave to one split."""

    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint32))
    """Tokens of each document, uint32."""
    text_bytes: int = 0
    loss_tokens: int = 0
    rows: np.ndarray | None = None
    """Rows of the staged file that these are, int64; None: all of them."""


@dataclass(slots=True)
class PartRecord:
    """What came of a part."""

    index: int
    fingerprint: str
    splits: dict[str, SplitRecord]
    skipped: Counter[str]
    skipped_first: dict[str, str]
    """By reason, the first document that was skipped for it, and where it stands."""
    replaced_utf8: int
    prints: Documents | None = None
    """Every document by itself; None where copies are not looked for."""

    @property
    def documents(self) -> int:
        """Documents of both splits."""
        return sum(len(split.lengths) for split in self.splits.values())

    @property
    def tokens(self) -> int:
        """Tokens of both splits."""
        return sum(int(split.lengths.sum(dtype=np.int64)) for split in self.splits.values())


def staged_rows(fingerprint: str, split: str) -> str:
    """Name of the Arrow file of a finished part."""
    return f"{fingerprint}.{split}.arrow"


def tokenise_part(job: PartJob) -> PartRecord:
    """Read, split and tokenise a part, and leave its files in the staging folder.

    Raises:
        CorpusError: a file cannot be read or lacks the wanted field.
        TokenizerError: the chat template cannot mark what the assistant writes.
        StorageError: a store cannot be reached.
    """
    tokenizer = open_tokenizer(job.tokenizer, job.cache_dir)
    problems = Problems()
    collected = {split: _Rows(job.corpus.kind == "chat") for split in SPLITS}
    prints = None if job.deduplicate is None else _Prints(job.deduplicate)
    for document in _encoded(job, tokenizer, problems):
        held_out = document.place < job.validation_fraction
        collected["validation" if held_out else "train"].add(document)
        if prints is not None:
            prints.add(document, held_out)
    for split, rows in collected.items():
        if rows.ids:
            table = rows_table(rows.ids, rows.masks if job.corpus.kind == "chat" else None)
            write_shard(job.staging, staged_rows(job.fingerprint, split), table)
    record = PartRecord(
        index=job.part.index,
        fingerprint=job.fingerprint,
        splits={split: rows.record() for split, rows in collected.items()},
        skipped=problems.skipped,
        skipped_first=problems.first,
        replaced_utf8=problems.replaced_utf8,
        prints=None if prints is None else prints.write(job.staging, job.fingerprint),
    )
    _write_record(job.staging, record)
    return record


def read_record(staging: str, index: int, fingerprint: str) -> PartRecord:
    """The record that a finished part left."""
    content = storage.read_bytes(storage.join(staging, fingerprint + RECORD))
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        counts = json.loads(str(arrays["counts"]))
        prints = None
        if "held_out" in arrays:
            prints = Documents(**{each.name: arrays[each.name] for each in fields(Documents)})
        return PartRecord(
            index=index,
            fingerprint=fingerprint,
            splits={split: SplitRecord(arrays[split], **counts[split]) for split in SPLITS},
            skipped=Counter(counts["skipped"]),
            skipped_first=counts.get("skipped_first", {}),
            replaced_utf8=counts["replaced_utf8"],
            prints=prints,
        )


def content_place(content: str) -> float:
    """A number in [0, 1) that depends on the content alone; equal documents share a split."""
    digest = hashlib.sha256(content.encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


@dataclass(frozen=True, slots=True)
class _Document:
    ids: np.ndarray
    mask: np.ndarray | None
    texts: tuple[str, ...]
    """Of a chat its roles and contents in turn."""
    text_bytes: int
    place: float
    number: int
    """Of the input that it comes from."""

    @property
    def loss_tokens(self) -> int:
        return count_loss_tokens(self.mask, len(self.ids))


class _Rows:
    def __init__(self, is_chat: bool) -> None:
        self._is_chat = is_chat
        self.ids: list[np.ndarray] = []
        self.masks: list[np.ndarray] = []
        self._text_bytes = 0
        self._loss_tokens = 0

    def add(self, document: _Document) -> None:
        self.ids.append(document.ids)
        if document.mask is not None:
            self.masks.append(document.mask)
        self._text_bytes += document.text_bytes
        self._loss_tokens += document.loss_tokens

    def record(self) -> SplitRecord:
        lengths = np.array([len(ids) for ids in self.ids], dtype=np.uint32)
        return SplitRecord(lengths, self._text_bytes, self._loss_tokens)


class _Prints:
    """Fingerprints of a part's documents as they come."""

    def __init__(self, config: DeduplicateConfig) -> None:
        self._finds_near = config.near_similarity is not None
        self._rows: list[tuple[bool, int, int, int]] = []
        self._hashes: list[int] = []
        self._signatures: list[np.ndarray] = []

    def add(self, document: _Document, held_out: bool) -> None:
        sizes = document.text_bytes, document.loss_tokens
        self._rows.append((held_out, document.number, *sizes))
        self._hashes.append(text_hash(document.texts))
        if self._finds_near:
            self._signatures.append(signature(document.ids))

    def write(self, staging: str, fingerprint: str) -> Documents:
        write_prints(staging, fingerprint, self._hashes, self._signatures)
        columns = np.array(self._rows, np.int64).reshape(-1, 4).T
        held_out, inputs, text_bytes, loss_tokens = columns
        return Documents(held_out.astype(bool), inputs.astype(np.uint16), text_bytes, loss_tokens)


def _encoded(job: PartJob, tokenizer: Tokenizer, problems: Problems) -> Iterator[_Document]:
    documents = (
        (span.file.input, document)
        for span in job.part.spans
        for document in read_documents(span, job.corpus, problems)
    )
    if job.corpus.kind == "chat":
        yield from _encoded_chats(documents, tokenizer, problems)
        return
    batch: list[tuple[int, str]] = []
    characters = 0
    for number, text in documents:
        batch.append((number, text))
        characters += len(text)
        if characters >= ENCODE_CHARACTERS:
            yield from _encoded_texts(batch, tokenizer)
            batch, characters = [], 0
    yield from _encoded_texts(batch, tokenizer)


def _encoded_texts(batch: list[tuple[int, str]], tokenizer: Tokenizer) -> Iterator[_Document]:
    encoded = tokenizer.encode_batch([text for _, text in batch])
    for (number, text), ids in zip(batch, encoded, strict=True):
        yield _Document(
            ids=np.array([*ids, tokenizer.eos_id], dtype=np.uint32),
            mask=None,
            texts=(text,),
            text_bytes=len(text.encode()),
            place=content_place(text),
            number=number,
        )


def _encoded_chats(
    chats: Iterator[tuple[int, Any]], tokenizer: Tokenizer, problems: Problems
) -> Iterator[_Document]:
    for number, chat in chats:
        try:
            ids, mask = render_chat(tokenizer, chat)
        except ChatError as error:
            problems.skip(error.reason, str(error))
            continue
        turns = check_messages(chat)
        yield _Document(
            ids=np.array(ids, dtype=np.uint32),
            mask=np.array(mask, dtype=bool),
            texts=tuple(text for turn in turns for text in (turn["role"], turn["content"])),
            text_bytes=sum(len(turn["content"].encode()) for turn in turns),
            place=content_place(json.dumps(turns)),
            number=number,
        )


def _write_record(staging: str, record: PartRecord) -> None:
    counts: dict[str, Any] = {
        split: {"text_bytes": part.text_bytes, "loss_tokens": part.loss_tokens}
        for split, part in record.splits.items()
    }
    counts |= {"skipped": dict(record.skipped), "skipped_first": record.skipped_first}
    counts |= {"replaced_utf8": record.replaced_utf8}
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        counts=np.array(json.dumps(counts)),
        train=record.splits["train"].lengths,
        validation=record.splits["validation"].lengths,
        **({} if record.prints is None else asdict(record.prints)),
    )
    storage.write_bytes(storage.join(staging, record.fingerprint + RECORD), buffer.getvalue())
