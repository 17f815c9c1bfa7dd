"""Documents out of raw files: text files, JSONL, Parquet and Arrow rows.

What cannot become a document is counted by reason, and the first of each is named. A file that
cannot be read at all, or in which no row has the wanted field, is an error: it is not a matter of
single documents.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pyarrow as pa
from pyarrow import ipc, parquet

from nsa_platform import storage
from nsa_platform.config.data import CorpusConfig
from nsa_platform.data.corpus import CorpusError, Span, file_format

Reason = Literal["empty", "invalid_utf8", "unreadable_row", "missing_field", "wrong_type"]

LINE_BYTES = 1 << 20
BATCH_ROWS = 1024
BYTE_ORDER_MARK = "\ufeff"


class Problems:
    """What did not become a document, and what had to be mended."""

    def __init__(self) -> None:
        self.skipped: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        """By reason, the first that was skipped: where it stands, and what is wrong if that is
        not said by the reason."""
        self.replaced_utf8 = 0
        self.place = ""
        """Where the document stands that is being read."""

    def skip(self, reason: str, message: str = "") -> None:
        """Count the document that is being read."""
        self.skipped[reason] += 1
        self.first.setdefault(reason, f"{self.place}: {message}" if message else self.place)


def read_documents(span: Span, corpus: CorpusConfig, problems: Problems) -> Iterator[Any]:
    """The documents of a span in file order: strings, or for kind=chat what stands in a row.

    Raises:
        CorpusError: the file cannot be read, no row has the field, or text is not UTF-8 and
            corpus.invalid_utf8 is "error".
        StorageError: the store cannot be reached.
    """
    kind, compression = file_format(span.file.name)
    problems.place = span.file.uri
    field = corpus.messages_field if corpus.kind == "chat" else corpus.text_field
    if kind == "text":
        values = iter([_whole(span, compression)])
    elif kind == "jsonl":
        values = _json_values(span, compression, field, corpus, problems)
    else:
        values = _column_values(span, kind, compression, field, corpus, problems)
    for value in values:
        document = value
        if corpus.kind == "text":
            document = _text(value, span, corpus, problems)
        elif value is None:
            problems.skip("empty")
            continue
        if document is not None:
            yield document


def _text(value: object, span: Span, corpus: CorpusConfig, problems: Problems) -> str | None:
    """The text of a value, or None if it is counted as a problem."""
    if value is None:
        problems.skip("empty")
        return None
    if isinstance(value, str):
        # JSON can spell half of a surrogate pair, which UTF-8 cannot.
        value = value.encode("utf-8", "surrogatepass")
    if not isinstance(value, bytes):
        problems.skip("wrong_type")
        return None
    text = _decode(value, span, corpus, problems)
    if text is not None and not text.strip():
        problems.skip("empty")
        return None
    return text


def _decode(content: bytes, span: Span, corpus: CorpusConfig, problems: Problems) -> str | None:
    """Text of bytes, or None if it is to be skipped; a byte order mark is dropped."""
    try:
        return content.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        if corpus.invalid_utf8 == "error":
            raise CorpusError(f"{span.file.uri}: is not UTF-8 ({error})") from error
    if corpus.invalid_utf8 == "skip":
        problems.skip("invalid_utf8")
        return None
    problems.replaced_utf8 += 1
    return content.decode("utf-8", "replace").removeprefix(BYTE_ORDER_MARK)


def _json_values(
    span: Span, compression: str | None, field: str, corpus: CorpusConfig, problems: Problems
) -> Iterator[Any]:
    rows = with_field = 0
    keys: list[str] = []
    for position, line in _lines(span, compression):
        problems.place = f"{span.file.uri} at byte {position}"
        if not line.strip():
            continue
        text = _decode(line, span, corpus, problems)
        if text is None:
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            problems.skip("unreadable_row")
            continue
        rows += 1
        if field not in row:
            keys = keys or sorted(row)
            problems.skip("missing_field")
            continue
        with_field += 1
        yield row[field]
    if rows and not with_field:
        raise CorpusError(f"{span.file.uri}: no row has the field {field!r}, but {', '.join(keys)}")


def _column_values(
    span: Span,
    kind: str,
    compression: str | None,
    field: str,
    corpus: CorpusConfig,
    problems: Problems,
) -> Iterator[Any]:
    row = 0
    with _readable(span), _open(span, compression) as file:
        for column in _columns(span, kind, file, field):
            is_text = corpus.kind == "text"
            for value in _bytes_column(column, span, field).to_pylist() if is_text else column:
                problems.place = f"{span.file.uri} in row {row}"
                row += 1
                try:
                    yield value if is_text else value.as_py()
                except UnicodeDecodeError:
                    problems.skip("unreadable_row")


def _columns(span: Span, kind: str, file: Any, field: str) -> Iterator[pa.Array]:
    if kind == "parquet":
        table = parquet.ParquetFile(file)
        _check_field(span, table.schema_arrow, field)
        for batch in table.iter_batches(BATCH_ROWS, columns=[field]):
            yield batch.column(0)
        return
    try:
        reader = ipc.open_file(file)
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
    except pa.ArrowInvalid:
        file.seek(0)
        reader = batches = ipc.open_stream(file)
    _check_field(span, reader.schema, field)
    for batch in batches:
        yield batch.column(field)


def _check_field(span: Span, schema: pa.Schema, field: str) -> None:
    if field not in schema.names:
        raise CorpusError(
            f"{span.file.uri}: has no column {field!r}, but {', '.join(schema.names)}"
        )


def _bytes_column(column: pa.Array, span: Span, field: str) -> pa.Array:
    """Strings as bytes, so that invalid UTF-8 in them can be counted."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return column.cast(pa.large_binary())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise CorpusError(
            f"{span.file.uri}: column {field!r} must hold text, it holds {column.type}"
        ) from error


def _whole(span: Span, compression: str | None) -> bytes:
    with _readable(span), _open(span, compression) as file:
        return file.read()


def _lines(span: Span, compression: str | None) -> Iterator[tuple[int, bytes]]:
    """Lines whose first byte lies in the span, with that byte's place; the last one may reach
    beyond it."""
    with _readable(span), _open(span, compression) as file:
        position, rest = span.start, b""
        if span.start:
            # The byte before the span tells whether a line begins with it.
            file.seek(span.start - 1)
            position -= 1
        # A compressed file is one span; its size says nothing about the length of its lines.
        stop = span.stop if compression is None else None
        skipping = span.start > 0
        while chunk := file.read(LINE_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if not skipping:
                    if stop is not None and position >= stop:
                        return
                    yield position, line
                skipping = False
                position += len(line) + 1
            if stop is not None and position >= stop and not skipping:
                return
        if rest and not skipping and (stop is None or position < stop):
            yield position, rest


@contextmanager
def _open(span: Span, compression: str | None) -> Iterator[Any]:
    with storage.open_input(span.file.uri) as file:
        if compression is None:
            yield file
            return
        with pa.CompressedInputStream(file, compression) as stream:
            # Arrow reads from the end of a file, which a compressed stream cannot do.
            seekable = file_format(span.file.name)[0] in ("parquet", "arrow")
            yield pa.BufferReader(stream.read()) if seekable else stream


@contextmanager
def _readable(span: Span) -> Iterator[None]:
    """Name the file in whatever goes wrong with its format."""
    try:
        yield
    except storage.StorageError:
        raise
    except (pa.ArrowException, OSError, EOFError) as error:
        raise CorpusError(f"{span.file.uri}: cannot be read: {error}") from error
