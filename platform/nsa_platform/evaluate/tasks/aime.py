"""Competition problems whose answer is an integer from 0 to 999, tried several times each.

pass@1 is the mean over all tries; its interval is over problems, for the tries at one of them are
alike. The answer is the last \\boxed{...} of what was written. Each limit of length is a cell.

Source: arXiv 2502.11089, section 4.2 (temperature 0.7, top-p 0.95, 16 tries, 8,192 and 16,384
tokens).
"""

import re
from collections.abc import Iterator
from typing import Annotated

from pydantic import BeforeValidator, Field

from nsa_platform.config.tasks import AimeTask
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.prompt import Decoding
from nsa_platform.evaluate.tasks.frame import open_frame
from nsa_platform.evaluate.tasks.rows import FileRow, read_rows
from nsa_platform.evaluate.tasks.task import Scorer, Task, WrittenSample

SOURCE = (
    "JSON lines with `problem` and `answer`, such as AIME 2024 (huggingface.co/datasets/"
    "HuggingFaceH4/aime_2024, saved as JSON lines)"
)
LARGEST = 999
PROMPT = "{problem}\n\nReason step by step and put the final answer into \\boxed{{}}.\n"

_SPACE = r"(?:[\s$]|\\[,;! ])*"
_INTEGER = re.compile(rf"{_SPACE}(\d{{1,3}}(?:(?:,|\\[,;! ])\d{{3}})+|\d{{1,100}}){_SPACE}")
_BRACES = re.compile(r"\\boxed\s*\{|\\\\(?!boxed)|\\[{}]|[{}]")


def _whole(answer: object) -> object:
    """The integer that a text or a number stands for."""
    if isinstance(answer, str) and re.fullmatch(r"\s*[0-9]{1,100}\s*", answer):
        answer = int(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer <= LARGEST:
        raise ValueError(f"must be an integer from 0 to {LARGEST}")
    return answer


class ProblemRow(FileRow):
    """A problem and its answer."""

    problem: Annotated[str, Field(min_length=1)]
    answer: Annotated[int, BeforeValidator(_whole)]


def aime(config: AimeTask, tokenizer: Tokenizer) -> Task:
    """The samples: every problem `attempts` times at every limit of length.

    Raises:
        ValueError: the file is not what it should be, an answer is no integer from 0 to 999, or a
            problem is too long.
        OSError: it cannot be read.
    """
    rows = read_rows(config.file, ProblemRow, source=SOURCE)[: config.samples]
    frame = open_frame(tokenizer, chat=config.chat)
    problems = []
    for number, row in enumerate(rows, 1):
        prompt = frame.around(tokenizer.encode(PROMPT.format(problem=row.problem)))
        if len(prompt) > config.max_problem_tokens:
            raise ValueError(
                f"{config.file}: row {number} has {len(prompt)} tokens, more than "
                f"tasks: aime: max_problem_tokens={config.max_problem_tokens}"
            )
        problems.append((prompt, row.answer))
    tries = [(number, attempt) for number in range(len(rows)) for attempt in range(config.attempts)]

    def samples() -> Iterator[WrittenSample]:
        for limit in sorted(config.max_new_tokens):
            for number, attempt in tries:
                prompt, answer = problems[number]
                seed = (config.seed * len(rows) + number) * config.attempts + attempt
                yield WrittenSample(
                    cells=(str(limit),),
                    unit=f"{limit}/{number}",
                    prompt=prompt,
                    references=(str(answer),),
                    max_new_tokens=limit,
                    score=_equals(answer),
                    decoding=Decoding(config.temperature, config.top_p, seed),
                )

    return Task("aime", len(config.max_new_tokens) * len(tries), samples)


def boxed_integer(written: str) -> int | None:
    """The integer in the last \\boxed{...} that is closed, or None if that holds something else:
    1,000 is a number, 1, 2 is not."""
    found = _INTEGER.fullmatch(_last_box(written))
    return int(re.sub(r"\D", "", found[1])) if found else None


def _last_box(written: str) -> str:
    """What stands in the closed box that begins last, with the braces in it."""
    opened: list[int | None] = []
    last, end = 0, 0
    for mark in _BRACES.finditer(written):
        if mark[0].startswith("\\boxed"):
            opened.append(mark.end())
        elif mark[0] == "{":
            opened.append(None)
        elif mark[0] == "}" and opened:
            start = opened.pop()
            if start is not None and start > last:
                last, end = start, mark.start()
    return written[last:end]


def _equals(answer: int) -> Scorer:
    return lambda written: float(boxed_integer(written) == answer)
