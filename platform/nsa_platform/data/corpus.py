"""Raw files: which ones belong to a corpus, and in what parts they are read.

A part is the unit of work: some files, or a byte range of one large JSONL file. How a corpus falls
into parts depends on the corpus alone, so the result never depends on how many tasks there are.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatch

from nsa_platform import storage
from nsa_platform.config.data import CorpusConfig

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
ROW_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
SMALLEST_PART_BYTES = 2 << 20
LARGEST_PART_BYTES = 64 << 20
PARTS = 1024
"""A corpus falls into about this many parts, as far as the two bounds above allow."""


class CorpusError(ValueError):
    """The corpus cannot be read; the message names the file or the input."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A raw file as it was found."""

    uri: str
    name: str
    """Number of its input and path below it: the order of the corpus, wherever it lies."""
    size: int
    """Bytes."""
    modified_ns: int

    @property
    def input(self) -> int:
        """Number of its input."""
        return int(self.name.partition("/")[0])


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [start, stop) of a file; a JSONL row belongs to the span that holds its first byte."""

    file: SourceFile
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Part:
    """A unit of work."""

    index: int
    spans: tuple[Span, ...]

    def fingerprint(self, settings: str) -> str:
        """Hex digits that change with the settings and with any file's path, size or time."""
        content = json.dumps([settings, [asdict(span) for span in self.spans]], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:24]


def file_format(name: str) -> tuple[str, str | None]:
    """What is in a file by its name: text, jsonl, parquet or arrow; and its compression."""
    for ending, compression in COMPRESSIONS.items():
        if name.endswith(ending):
            return file_format(name.removesuffix(ending))[0], compression
    for ending, kind in ROW_FORMATS.items():
        if name.endswith(ending):
            return kind, None
    return "text", None


def find_files(corpus: CorpusConfig) -> list[SourceFile]:
    """All files of the corpus in a fixed order: by input, then by path.

    Raises:
        CorpusError: an input does not exist, an input that is a file has an ending that is not
            among the suffixes, or no file is left.
        StorageError: a store cannot be reached.
    """
    found: dict[str, SourceFile] = {}
    seen = 0
    for number, location in enumerate(corpus.inputs):
        for entry in _entries(corpus, location):
            seen += 1
            if not entry.name.endswith(corpus.suffixes):
                continue
            if any(fnmatch(entry.name, pattern) for pattern in corpus.exclude):
                continue
            if corpus.kind == "chat" and file_format(entry.name)[0] == "text":
                continue
            name = f"{number}/{entry.name}"
            file = SourceFile(entry.uri, name, entry.size, entry.modified_ns)
            found.setdefault(entry.uri, file)
    if not found:
        wanted = "rows of messages in " if corpus.kind == "chat" else ""
        raise CorpusError(
            f"corpus.inputs: none of {seen} files in {', '.join(corpus.inputs)} counts; "
            f"wanted are {wanted}{' '.join(corpus.suffixes)}, less corpus.exclude"
        )
    return sorted(found.values(), key=lambda file: (file.input, file.name))


def plan_parts(files: list[SourceFile]) -> list[Part]:
    """Cut the corpus into parts of similar size."""
    total = sum(file.size for file in files)
    target = min(max(total // PARTS, SMALLEST_PART_BYTES), LARGEST_PART_BYTES)
    parts: list[Part] = []
    spans: list[Span] = []
    for span in (span for file in files for span in _spans(file, target)):
        held = sum(each.stop - each.start for each in spans)
        if spans and held + span.stop - span.start > target:
            parts.append(Part(len(parts), tuple(spans)))
            spans = []
        spans.append(span)
    parts.append(Part(len(parts), tuple(spans)))
    return parts


def _spans(file: SourceFile, target: int) -> Iterator[Span]:
    if file_format(file.name) != ("jsonl", None):
        yield Span(file, 0, file.size)
        return
    for start in range(0, max(file.size, 1), target):
        yield Span(file, start, min(start + target, file.size))


def _entries(corpus: CorpusConfig, location: str) -> list[storage.FileEntry]:
    if storage.is_folder(location):
        return storage.walk(location)
    try:
        entry = storage.stat(location)
    except storage.MissingFileError as error:
        raise CorpusError(f"corpus.inputs: {error}") from error
    if not entry.name.endswith(corpus.suffixes):
        raise CorpusError(
            f"corpus.inputs: {location} ends in none of corpus.suffixes "
            f"({' '.join(corpus.suffixes)})"
        )
    return [entry]
