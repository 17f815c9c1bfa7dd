"""What a preparation has to do: files, parts, fingerprints, and whether it was done before."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from nsa_platform import storage
from nsa_platform.config.runs import PrepareDataRun
from nsa_platform.data.chat import ChatError, check_messages, check_template
from nsa_platform.data.corpus import CorpusError, SourceFile, find_files, plan_parts
from nsa_platform.data.documents import Problems, read_documents
from nsa_platform.data.manifest import MANIFEST, ShardError, read_manifest
from nsa_platform.data.parts import SPLITS, PartJob, content_place
from nsa_platform.data.tokenizer import Tokenizer, open_tokenizer, train_tokenizer

VERSION = 1
STAGING = "_staging"
PREPARED = "prepared.json"
TOKENIZER = "tokenizer"
COMPLETE = "complete"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a stage is."""

    stage: str
    done: int
    total: int
    unit: str
    documents: int = 0
    tokens: int = 0


Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a preparation made; prepared.json holds it and is written last."""

    fingerprint: str
    """Of the configuration and of every input's path, size and time."""
    files: int
    source_bytes: int
    documents: dict[str, int]
    """By split, as the next four."""
    tokens: dict[str, int]
    text_bytes: dict[str, int]
    shards: dict[str, int]
    digests: dict[str, str]
    """sha256 of the manifests."""
    skipped: dict[str, int]
    """Documents that were left out, by reason."""
    replaced_utf8: int
    """Documents whose invalid bytes became U+FFFD."""
    vocab_size: int
    parts: int
    reused_parts: int
    """Parts that an earlier try had finished; all of them if there was nothing to do."""
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    """By input, where copies were left out: the fields of SourceCopies."""
    skipped_first: dict[str, str] = field(default_factory=dict)
    """By reason, the first document that was left out for it, and where it stands."""


class Plan:
    """The files, parts and fingerprints of a run.

    Raises:
        CorpusError: no file counts, or the output would lie in an input or over something else.
        TokenizerError: the tokenizer that is given cannot be used.
        StorageError: a store cannot be reached.
    """

    def __init__(self, run: PrepareDataRun, cache_dir: str) -> None:
        self.run = run
        self.cache_dir = cache_dir
        self.staging = storage.join(run.output, STAGING)
        _check_output(run)
        self.files = find_files(run.corpus)
        self.parts = plan_parts(self.files)
        self._given = self._given_tokenizer()
        files = [asdict(file) for file in self.files]
        self._tokenizer_key = _digest(
            [self._given.fingerprint]
            if self._given
            else [run.tokenizer.model_dump(), self._settings(""), files]
        )
        content: list[Any] = [self._tokenizer_key, run.shard_tokens, self._settings(""), files]
        if run.deduplicate is not None:
            content.append(run.deduplicate.model_dump())
        self.fingerprint = _digest(content)

    def part_jobs(self, tokenizer_uri: str, tokenizer: Tokenizer) -> list[PartJob]:
        """All parts as jobs, in order."""
        settings, deduplicate = self._settings(tokenizer.fingerprint), self.run.deduplicate
        if deduplicate is not None:
            # Which fingerprints a part leaves; how alike is alike is asked later.
            settings += " near" if deduplicate.near_similarity is not None else " equal"
        return [
            PartJob(
                part=part,
                fingerprint=part.fingerprint(settings),
                corpus=self.run.corpus,
                tokenizer=tokenizer_uri,
                staging=self.staging,
                cache_dir=self.cache_dir,
                validation_fraction=self.run.validation_fraction,
                deduplicate=deduplicate,
            )
            for part in self.parts
        ]

    def finished(self) -> Prepared | None:
        """What an earlier run made, if it was this very run and all of it is still there."""
        output = self.run.output
        try:
            done = Prepared(**json.loads(storage.read_text(storage.join(output, PREPARED))))
            manifests = {split: read_manifest(storage.join(output, split)) for split in SPLITS}
        except (storage.MissingFileError, ShardError, TypeError, ValueError):
            return None
        if done.fingerprint != self.fingerprint:
            return None
        for split, manifest in manifests.items():
            present = {e.name: e.size for e in storage.walk(storage.join(output, split))}
            expected = {shard.name: shard.bytes for shard in manifest.shards}
            if manifest.digest != done.digests[split] or not expected.items() <= present.items():
                return None
        if not storage.exists(storage.join(output, TOKENIZER, "tokenizer.json")):
            return None
        storage.delete_tree(self.staging)
        return Prepared(**{**asdict(done), "reused_parts": done.parts})

    def replaces(self) -> bool:
        """Whether the output holds what other settings or inputs made, and this run would not."""
        return storage.exists(storage.join(self.run.output, PREPARED)) and self.finished() is None

    def make_tokenizer(self, report: Report) -> tuple[str, Tokenizer]:
        """The tokenizer in the staging folder, where every task finds it; trained if need be."""
        uri = storage.join(self.staging, f"tokenizer-{self._tokenizer_key}")
        complete = storage.join(uri, COMPLETE)
        if not storage.exists(complete):
            storage.delete_tree(uri)
            with tempfile.TemporaryDirectory() as folder:
                wanted = self.run.tokenizer
                if self._given is not None:
                    self._given.save(folder)
                elif wanted.train_vocab_size is not None:
                    train_tokenizer(
                        self._sample(report),
                        wanted.train_vocab_size,
                        folder,
                        all_numbers=wanted.train_all_numbers,
                    )
                storage.upload_tree(folder, uri)
            storage.write_text(complete, "")
        return uri, open_tokenizer(uri, self.cache_dir)

    def forget_old_output(self) -> None:
        """Take away what an earlier run made; its marks of completeness go first."""
        output = self.run.output
        storage.delete_tree(storage.join(output, PREPARED))
        for split in SPLITS:
            storage.delete_tree(storage.join(output, split, MANIFEST))
        for name in (*SPLITS, TOKENIZER):
            storage.delete_tree(storage.join(output, name))

    def _settings(self, tokenizer_fingerprint: str) -> str:
        """Whatever changes the tokens of a part, apart from its files."""
        corpus = self.run.corpus
        fields = [corpus.kind, corpus.text_field, corpus.messages_field, corpus.invalid_utf8]
        return json.dumps([VERSION, tokenizer_fingerprint, self.run.validation_fraction, *fields])

    def _given_tokenizer(self) -> Tokenizer | None:
        path = self.run.tokenizer.path
        if path is None:
            return None
        tokenizer = open_tokenizer(path, self.cache_dir)
        if self.run.corpus.kind == "chat":
            check_template(tokenizer)
        return tokenizer

    def _sample(self, report: Report) -> Iterator[str]:
        """Training documents, files in hashed order, until the sample is full."""
        limit = self.run.tokenizer.train_sample_mb * 10**6
        total = min(limit, sum(file.size for file in self.files))
        taken = documents = 0
        for file in sorted(self.files, key=lambda file: content_place(file.name)):
            if taken >= limit:
                break
            for text in self._training_texts(file):
                yield text
                taken += len(text.encode())
                documents += 1
                if taken >= limit:
                    break
            report(_reading(min(taken, total), total, documents))
        report(_reading(total, total, documents))

    def _training_texts(self, file: SourceFile) -> Iterator[str]:
        spans = (span for part in self.parts for span in part.spans if span.file == file)
        for span in spans:
            for document in read_documents(span, self.run.corpus, Problems()):
                texts, content = _texts(document)
                if texts and content_place(content) >= self.run.validation_fraction:
                    yield from texts


def _reading(taken: int, total: int, documents: int) -> Progress:
    return Progress("reading for the tokenizer", taken, total, "bytes", documents)


def _texts(document: Any) -> tuple[list[str], str]:
    """The texts in a document or chat, and the content that decides its split."""
    if isinstance(document, str):
        return [document], document
    try:
        turns = check_messages(document)
    except ChatError:
        return [], ""
    return [turn["content"] for turn in turns], json.dumps(turns)


def _check_output(run: PrepareDataRun) -> None:
    output = run.output.rstrip("/") + "/"
    for location in run.corpus.inputs:
        if output.startswith(location.rstrip("/") + "/"):
            raise CorpusError(
                f"output: {run.output} lies in the input {location}, so it would feed on itself"
            )
    if storage.exists(run.output) and not storage.is_folder(run.output):
        raise CorpusError(f"output: {run.output} is a file, must be a folder")
    names = set(storage.list_names(run.output))
    ours = {STAGING, PREPARED, TOKENIZER, *SPLITS}
    if names and not (names & {STAGING, PREPARED} and names <= ours):
        raise CorpusError(
            f"output: {run.output} holds {', '.join(sorted(names)[:5])}, which prepare_data did "
            "not make; give an empty or a new folder"
        )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
