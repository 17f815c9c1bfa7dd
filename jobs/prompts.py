"""Rows of prompts out of JSONL and Arrow files, in order, each of them checked."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import ipc

from nsa_platform import storage
from nsa_platform.data.chat import ChatError, Message, check_messages
from nsa_platform.data.corpus import file_format

ENDINGS = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".arrow", ".feather")
COLUMNS = ("id", "prompt", "messages")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class PromptError(ValueError):
    """A file or a row of it cannot be used; the message names the file and the line."""


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One row of the input."""

    id: str | int | None
    content: str | list[Message]
    """A text to continue, or a chat to answer."""


def find_prompt_files(inputs: Sequence[str]) -> list[str]:
    """Addresses of all files: inputs as given, files of a folder by their names.

    Raises:
        PromptError: an input does not exist or holds no JSONL or Arrow file.
        StorageError: a store cannot be reached.
    """
    files: list[str] = []
    for location in inputs:
        found = [location]
        if storage.is_folder(location):
            found = [entry.uri for entry in storage.walk(location) if _is_readable(entry.name)]
        elif not storage.exists(location):
            raise PromptError(f"inputs: {location}: it does not exist")
        if not found or not all(map(_is_readable, found)):
            raise PromptError(f"inputs: {location} must be or hold files {' '.join(ENDINGS)}")
        files += found
    return files


def read_prompts(uri: str) -> Iterator[PromptRow]:
    """The rows of one file in its order; empty lines are passed over.

    Raises:
        PromptError: the file is broken or a row is not what it must be.
        StorageError: the store cannot be reached.
    """
    kind, compression = file_format(uri)
    with _readable(uri), storage.open_input(uri) as file:
        stream = file if compression is None else pa.CompressedInputStream(file, compression)
        rows = _json_rows(uri, stream) if kind == "jsonl" else _arrow_rows(uri, stream)
        for place, row in rows:
            yield _checked(place, row)


def _is_readable(name: str) -> bool:
    return name.endswith(ENDINGS)


def _json_rows(uri: str, stream: Any) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(io.BufferedReader(stream), start=1):
        place = f"{uri}: line {number}"
        content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if not content.strip():
            continue
        try:
            row = json.loads(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise PromptError(f"{place}: is not UTF-8 ({error})") from None
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{place}: is not JSON ({error})") from None
        yield place, row


def _arrow_rows(uri: str, stream: Any) -> Iterator[tuple[str, Any]]:
    # Arrow reads a file from its end, which a compressed stream cannot do.
    source = (
        pa.BufferReader(stream.read()) if isinstance(stream, pa.CompressedInputStream) else (stream)
    )
    try:
        reader = ipc.open_file(source)
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
    except pa.ArrowInvalid:
        source.seek(0)
        reader = batches = ipc.open_stream(source)
    wanted = [name for name in COLUMNS if name in reader.schema.names]
    if not set(wanted) & {"prompt", "messages"}:
        raise PromptError(
            f"{uri}: has neither a column 'prompt' nor 'messages', but "
            f"{', '.join(reader.schema.names) or 'none'}"
        )
    number = 0
    for batch in batches:
        for row in batch.select(wanted).to_pylist():
            number += 1
            yield f"{uri}: row {number}", row


def _checked(place: str, row: Any) -> PromptRow:
    if not isinstance(row, Mapping):
        raise PromptError(f"{place}: must be an object, got {type(row).__name__}")
    row_id, text, messages = (row.get(name) for name in COLUMNS)
    if isinstance(row_id, bool) or not isinstance(row_id, str | int | None):
        raise PromptError(f"{place}: id must be a string or an integer, got {row_id!r}")
    if (text is None) == (messages is None):
        raise PromptError(
            f"{place}: must have either 'prompt' or 'messages', it has {_names(row) or 'neither'}"
        )
    if messages is not None:
        try:
            result = PromptRow(row_id, check_messages(messages))
        except ChatError as error:
            raise PromptError(f"{place}: {error}") from None
    elif isinstance(text, str):
        result = PromptRow(row_id, text)
    else:
        raise PromptError(f"{place}: prompt must be a string, got {type(text).__name__}")
    try:
        # JSON can spell half of a surrogate pair, which is no text.
        json.dumps([result.id, result.content], ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(f"{place}: holds half a character ({error.reason})") from None
    return result


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(str(name) for name, value in row.items() if value is not None)[:200]


@contextmanager
def _readable(uri: str) -> Iterator[None]:
    """Name the file in whatever goes wrong with its format."""
    try:
        yield
    except storage.StorageError:
        raise
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise PromptError(f"{uri}: cannot be read: {error}") from error
