"""Rows of a user's file: JSON lines or one JSON list, with the fields that a task needs."""

import json
from collections.abc import Sequence
from typing import Any

from nsa_platform import storage


def read_rows(location: str, fields: Sequence[str], *, source: str) -> list[dict[str, Any]]:
    """All rows of a file, each an object that has the fields.

    Args:
        source: what the file should be and where it comes from, for errors.

    Raises:
        ValueError: it holds something else.
        MissingFileError: there is none.
    """
    try:
        text = storage.read_text(location)
    except storage.MissingFileError as error:
        raise storage.MissingFileError(f"{error}: it should be {source}") from None
    try:
        whole = text.lstrip().startswith("[")
        rows = json.loads(text) if whole else [json.loads(line) for line in text.splitlines()]
    except ValueError as error:
        raise ValueError(f"{location}: is neither JSON lines nor a JSON list: {error}") from None
    if not rows:
        raise ValueError(f"{location}: holds no row; it should be {source}")
    for number, row in enumerate(rows, 1):
        missing = [name for name in fields if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(
                f"{location}: row {number} has no {', '.join(missing)}; it should be {source}"
            )
    return rows
