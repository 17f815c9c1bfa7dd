"""Competition problems whose answer is an integer from 0 to 999, tried several times each.

pass@1 is the mean over all tries; its interval resamples problems, for the tries at one of them are
alike. The answer is the last \\boxed{...} of what was written. Each limit of length is a cell.

Source: arXiv 2502.11089, section 4.2 (temperature 0.7, top-p 0.95, 16 tries, 8,192 and 16,384
tokens).
"""

import re
from collections.abc import Iterator

from nsa_platform.config.tasks import AimeTask
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.prompt import Decoding
from nsa_platform.evaluate.tasks.frame import open_frame
from nsa_platform.evaluate.tasks.rows import read_rows
from nsa_platform.evaluate.tasks.task import Scorer, Task, WrittenSample

SOURCE = (
    "JSON lines with `problem` and `answer`, such as AIME 2024 (huggingface.co/datasets/"
    "HuggingFaceH4/aime_2024, saved as JSON lines)"
)
PROMPT = "{problem}\n\nReason step by step and put the final answer into \\boxed{{}}.\n"


def aime(config: AimeTask, tokenizer: Tokenizer) -> Task:
    """The samples: every problem `attempts` times at every limit of length.

    Raises:
        ValueError: the file is not what it should be, an answer is no integer, or a problem is
            too long.
        OSError: it cannot be read.
    """
    rows = read_rows(config.file, ("problem", "answer"), source=SOURCE)[: config.samples]
    frame = open_frame(tokenizer, chat=config.chat)
    problems = []
    for number, row in enumerate(rows, 1):
        answer = str(row["answer"]).strip()
        if not answer.isdecimal():
            raise ValueError(f"{config.file}: row {number}: answer={answer!r} must be an integer")
        prompt = frame.around(tokenizer.encode(PROMPT.format(problem=row["problem"])))
        if len(prompt) > config.max_problem_tokens:
            raise ValueError(
                f"{config.file}: row {number} has {len(prompt)} tokens, more than "
                f"tasks: aime: max_problem_tokens={config.max_problem_tokens}"
            )
        problems.append((prompt, answer))
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
                    references=(answer,),
                    max_new_tokens=limit,
                    score=_equals(answer),
                    decoding=Decoding(config.temperature, config.top_p, seed),
                )

    return Task("aime", len(config.max_new_tokens) * len(tries), samples)


def boxed_integer(written: str) -> int | None:
    """The integer in the last \\boxed{...}, or None if that holds something else."""
    found = re.findall(r"\\boxed\s*\{([^{}]*)\}", written)
    inside = re.sub(r"[\s,$]|\\[,;! ]", "", found[-1]) if found else ""
    return int(inside) if inside.isdecimal() else None


def _equals(answer: str) -> Scorer:
    return lambda written: float(boxed_integer(written) == int(answer))
