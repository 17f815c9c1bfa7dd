"""Rows of LongBench's files, by the score that reads them, and its file of prompts.

All of it is checked when a task is opened: a score that meets something else would end an
evaluation after hours, or count nonsense.
"""

import json
from collections.abc import Iterable
from string import Formatter
from typing import Annotated

from pydantic import Field

from nsa_platform.evaluate.tasks import longbench_scores as scores
from nsa_platform.evaluate.tasks.rows import FileRow, read_source

PROMPTS_SOURCE = "config/dataset2prompt.json of github.com/THUDM/LongBench"
PLACES = ("context", "input")


class LongBenchRow(FileRow):
    """A text and what is asked about it."""

    input: str
    context: Annotated[str, Field(min_length=1)]
    answers: Annotated[list[str], Field(min_length=1)]
    all_classes: list[str] | None
    length: Annotated[int, Field(ge=0)]
    """Words of the context, or characters of Chinese."""


class ClassRow(LongBenchRow):
    """The answer is one of some classes."""

    all_classes: Annotated[list[str], Field(min_length=1)]


class ParagraphRow(LongBenchRow):
    """The answer names a paragraph."""

    answers: Annotated[
        list[Annotated[str, Field(pattern=r"Paragraph [0-9]+")]], Field(min_length=1)
    ]


class ChineseParagraphRow(LongBenchRow):
    """The same in Chinese."""

    answers: Annotated[list[Annotated[str, Field(pattern="段落[0-9]+")]], Field(min_length=1)]


class CountRow(LongBenchRow):
    """The answer is a number."""

    answers: Annotated[list[Annotated[str, Field(pattern="^[0-9]+$")]], Field(min_length=1)]


ROWS: dict[scores.Against, type[LongBenchRow]] = {
    scores.classification: ClassRow,
    scores.retrieval: ParagraphRow,
    scores.retrieval_chinese: ChineseParagraphRow,
    scores.count: CountRow,
}
"""Rows of scores that need more than texts."""


def read_prompts(location: str | None, datasets: Iterable[str]) -> dict[str, str]:
    """Prompts of these datasets, as far as the file has them.

    Raises:
        ValueError: the file is something else, or a prompt has other places than {context} and
            {input}.
        OSError: it cannot be read.
    """
    if location is None:
        return {}
    place = f"tasks: longbench: prompts: {location}"
    try:
        tree = json.loads(read_source(location, source=PROMPTS_SOURCE))
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not {PROMPTS_SOURCE}: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{place} is not {PROMPTS_SOURCE}: it holds no object of names")
    used = {name: tree[name] for name in datasets if name in tree}
    for name, prompt in used.items():
        if problem := _problem(prompt):
            raise ValueError(
                f"{place}: {name}: {problem}; a prompt is a text with {{context}} and, where the "
                "dataset asks something, {input}"
            )
    return used


def _problem(prompt: object) -> str | None:
    """What is wrong with a prompt, or None."""
    if not isinstance(prompt, str):
        return f"is no text, got {prompt!r}"
    try:
        parts = list(Formatter().parse(prompt))
    except ValueError as error:
        return f"has a brace that stands alone ({error})"
    places = [(name, form, conversion) for _, name, form, conversion in parts if name is not None]
    for name, form, conversion in places:
        if name not in PLACES or form or conversion:
            return f"has an unknown place {{{name}}}" if name not in PLACES else f"formats {name}"
    return None if any(name == "context" for name, *_ in places) else "has no place {context}"
