"""Problems of many steps, and chats that work them out: what fine-tuning on reasoning is worth.

    python -m jobs.reasoning_chats runs/reason --chats 20000 --problems 120 --steps 2 4 8 16 32 64

Writes OUTPUT/text.jsonl, sums, lines told twice and worked problems of a quarter of the steps at
most to pretrain on; OUTPUT/chats.jsonl, worked problems of all steps to fine-tune on; and
OUTPUT/problems.jsonl, others with `problem` and `answer`, which the task `aime` samples answers to.
A problem leads from name to name, adding a number each time, among lines that lead nowhere; the
answer is a number from 0 to 9, and the way to it is as long as there are steps. Each step must find
the line that goes on, anywhere in the problem, and add; none is hard by itself.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from jobs.cli import fail, interruptible, warn
from nsa_platform import storage
from nsa_platform.evaluate.tasks.aime import PROMPT

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""Sums are modulo ten, so that a guess is right once in ten times. As words, each a token: what
follows a name is then found right behind it."""
SHORT = 4
"""Text to pretrain on has problems of the steps over this."""
SUMS = 30
"""Sums of one text of sums. There is such a text for every two problems: from problems alone, a
number for each ten tokens, a small model learns its sums last."""
TOLD_TWICE = 24
"""Lines of one text that tells them twice, the second time in another order. There is such a text
for every two problems: it teaches to find a line by its first name, which in a worked problem is
two tokens of a line's eleven."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem and the way to its answer."""

    text: str
    steps: tuple[str, ...]
    answer: int

    @property
    def solution(self) -> str:
        """All steps, and the answer where the task `aime` reads it."""
        return "\n".join([*self.steps, f"The answer is \\boxed{{{self.answer}}}."])


def num_names(steps: int) -> int:
    """Names in a problem of so many steps: those of the way, and half as many aside and one."""
    return steps + 1 + steps // 2 + 1


def names(steps: int) -> list[str]:
    """As many names of two open syllables as a problem of so many steps has, none rarer than
    another. Each becomes a token, which a model has to learn: the fewer, the sooner.

    Raises:
        ValueError: there are not so many.
    """
    syllables = [f"{first}{second}" for first in "bdgklmnprstvz" for second in "aeiou"]
    every = [first + second for first in syllables for second in ("ba", "ne", "ti", "lo", "mu")]
    if (count := num_names(steps)) > len(every):
        raise ValueError(f"--steps={steps} needs {count} names, there are {len(every)}")
    return every[:count]


def make_problem(pool: Sequence[str], *, steps: int, seed: str) -> Problem:
    """A problem whose answer takes exactly `steps` steps; half as many more lead nowhere.

    What a name leads to is told once, behind that name with a capital: the way is found by looking.

    Raises:
        ValueError: the pool has too few names.
    """
    dice = random.Random(seed)
    if len(pool) < num_names(steps):
        raise ValueError(f"{steps} steps need {num_names(steps)} names, got {len(pool)}")
    chosen = dice.sample(pool, num_names(steps))
    way, aside = chosen[: steps + 1], chosen[steps + 1 :]
    start = value = dice.randrange(len(NUMBERS))
    told, worked = [], []
    for name, following in pairwise(way):
        more = dice.randrange(len(NUMBERS))
        line = f"{name.title()} {following} {NUMBERS[more]}"
        told.append(f"{line}.")
        worked.append(f"{line}: {_sum(value, more)}")
        value = (value + more) % len(NUMBERS)
    for name, following in pairwise(aside):
        told.append(f"{name.title()} {following} {dice.choice(NUMBERS)}.")
    dice.shuffle(told)
    rule = f"A line A b c says that b is a plus c, modulo {len(NUMBERS)}."
    question = f"If {way[0]} is {NUMBERS[start]}, what is {way[-1]}?"
    return Problem("\n".join([*told, f"{rule} {question}"]), tuple(worked), value)


def _sum(first: int, second: int) -> str:
    total = (first + second) % len(NUMBERS)
    return f"{NUMBERS[first]} plus {NUMBERS[second]} is {NUMBERS[total]}."


def problems(
    pool: Sequence[str], *, steps: Sequence[int], count: int, seed: str
) -> Iterator[Problem]:
    """`count` problems, of each number of steps in turn."""
    for number in range(count):
        yield make_problem(pool, steps=steps[number % len(steps)], seed=f"{seed}/{number}")


def texts(pool: Sequence[str], *, steps: Sequence[int], count: int, seed: str) -> Iterator[str]:
    """`count` worked problems; behind them, in turn, a text of sums and one of lines told twice."""
    for number, problem in enumerate(problems(pool, steps=steps, count=count, seed=seed)):
        yield f"{problem.text}\n{problem.solution}\n"
        if number % 2:
            dice = random.Random(f"{seed}/sums/{number}")
            pairs = product(range(len(NUMBERS)), repeat=2)
            yield "".join(f"so {_sum(*pair)}\n" for pair in dice.sample(list(pairs), SUMS))
        else:
            yield _told_twice(pool, random.Random(f"{seed}/lines/{number}"))


def _told_twice(pool: Sequence[str], dice: random.Random) -> str:
    lines = []
    for name in dice.sample(pool, min(TOLD_TWICE, len(pool))):
        following = dice.choice([other for other in pool if other != name])
        lines.append(f"{name.title()} {following} {dice.choice(NUMBERS)}.\n")
    return "".join(lines + dice.sample(lines, len(lines)))


def write_files(
    output: str, *, chats: int, num_problems: int, steps: Sequence[int], seed: int
) -> None:
    """Write the three files, local or s3://.

    Raises:
        ValueError: the steps are too many for the names there are.
        OSError: a file cannot be written.
    """
    pool = names(max(steps))
    short = [each for each in steps if each <= max(steps) // SHORT] or [min(steps)]
    files: dict[str, Iterator[dict[str, Any]]] = {
        "text.jsonl": (
            {"text": each} for each in texts(pool, steps=short, count=chats, seed=f"{seed}/text")
        ),
        "chats.jsonl": (
            {"messages": _messages(each)}
            for each in problems(pool, steps=steps, count=chats, seed=f"{seed}/chats")
        ),
        "problems.jsonl": (
            {"problem": each.text, "answer": each.answer, "steps": len(each.steps)}
            for each in problems(pool, steps=steps, count=num_problems, seed=f"{seed}/held out")
        ),
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        storage.write_text(storage.join(output, name), text)


def _messages(problem: Problem) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": PROMPT.format(problem=problem.text)},
        {"role": "assistant", "content": problem.solution},
    ]


@interruptible("interrupted; the same command begins anew")
def main(argv: Sequence[str] | None = None) -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", help="the folder to write to, local or s3://")
    parser.add_argument("--chats", type=int, required=True, help="to fine-tune on, and texts")
    parser.add_argument("--problems", type=int, required=True, help="to answer")
    parser.add_argument("--steps", type=int, nargs="+", required=True, help="of a problem")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    for name, least in (("chats", options.chats), ("problems", options.problems)):
        if least < 1:
            parser.error(f"--{name} must be at least 1, got {least}")
    if min(options.steps) < 1:
        parser.error(f"--steps must be at least 1, got {min(options.steps)}")
    output = options.output if "://" in options.output else str(Path(options.output))
    try:
        if storage.exists(storage.join(output, "problems.jsonl")):
            warn(f"{output}: the problems and chats that were there are replaced")
        write_files(
            output,
            chats=options.chats,
            num_problems=options.problems,
            steps=options.steps,
            seed=options.seed,
        )
    except (ValueError, OSError) as error:
        fail(str(error))
    print(f"{output}: {options.chats:,} chats and {options.problems:,} problems")


if __name__ == "__main__":
    main()
