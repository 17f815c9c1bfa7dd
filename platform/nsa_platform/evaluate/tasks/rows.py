"""Rows of a user's file: JSON lines or one JSON list, each checked by the model of a task's row."""

import json
import reprlib
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from nsa_platform import storage
from nsa_platform.config.base import plain_message


class FileRow(BaseModel):
    """Base of a row. Types are not converted; fields that a task does not read may be there."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


R = TypeVar("R", bound=FileRow)


def read_source(location: str, *, source: str) -> str:
    """The text of a user's file, without a byte order mark.

    Args:
        source: what the file should be and where it comes from, for errors.

    Raises:
        ValueError: it is no text.
        MissingFileError: there is none.
    """
    try:
        return storage.read_text(location).removeprefix("\ufeff")
    except storage.MissingFileError as error:
        raise storage.MissingFileError(f"{error}: it should be {source}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{location}: is no UTF-8 text (byte {error.start}); it should be {source}"
        ) from None


def read_rows(location: str, model: type[R], *, source: str) -> list[R]:
    """All rows of a file.

    Args:
        source: what the file should be and where it comes from, for errors.

    Raises:
        ValueError: it holds something else; the message names the line and the field.
        MissingFileError: there is none.
    """
    trees = _trees(location, read_source(location, source=source))
    rows = [_checked(f"{location}: {place}", tree, model, source) for place, tree in trees]
    if not rows:
        raise ValueError(f"{location}: holds no row; it should be {source}")
    return rows


def _trees(location: str, text: str) -> Iterator[tuple[str, Any]]:
    """Plain rows, each with the place where it stands."""
    if text.lstrip().startswith("["):
        for number, tree in enumerate(_json(location, text, 1), 1):
            yield f"row {number}", tree
        return
    # A string may hold other ends of lines (U+2028, U+0085) as they are: only "\n" parts rows.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", _json(location, line, number)


def _json(location: str, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{location}: is neither JSON lines nor a JSON list: line {line + error.lineno - 1}, "
            f"column {error.colno}: {error.msg}"
        ) from None


def _checked(place: str, tree: Any, model: type[R], source: str) -> R:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        found = error.errors()
    if not isinstance(tree, dict):
        raise ValueError(f"{place} is no object, got {reprlib.repr(tree)}; it should be {source}")
    missing = [str(each["loc"][0]) for each in found if each["type"] == "missing"]
    if missing:
        raise ValueError(f"{place} has no {', '.join(missing)}; it should be {source}")
    problem = found[0]
    field = ".".join(str(part) for part in problem["loc"])
    message = plain_message(problem["msg"])
    raise ValueError(f"{place}: {field}={reprlib.repr(problem['input'])}: {message}")
