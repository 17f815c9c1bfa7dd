"""LongBench v2: one of four choices about a text of 8,000 to 2 million words.

A question counts in the cell of all, in that of its difficulty and in that of its class of length.
The letter is read from "The correct answer is (X)". With a chain of thought there are two calls:
one to think about the text, one for the letter, by the thoughts alone.

Source: arXiv 2412.15204; github.com/THUDM/LongBench, pred.py.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field

from nsa_platform.config.tasks import LongBenchV2Task
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.prompt import Decoding
from nsa_platform.evaluate.tasks.frame import open_frame
from nsa_platform.evaluate.tasks.longbench import middle_left_out
from nsa_platform.evaluate.tasks.rows import FileRow, read_rows, read_source
from nsa_platform.evaluate.tasks.task import (
    ReasonedSample,
    Scorer,
    Task,
    WrittenSample,
)

SOURCE = "data.json of LongBench v2 (huggingface.co/datasets/THUDM/LongBench-v2)"
PROMPT_SOURCE = "prompts/{name}.txt of github.com/THUDM/LongBench"
THOUGHT_TOKENS, ANSWER_TOKENS = 1024, 128
CASE = "Question: $Q$\n(A) $C_A$\n(B) $C_B$\n(C) $C_C$\n(D) $C_D$\n\n"
TEXT = "Below is a text, and then a question about it with four choices.\n\n$DOC$\n\n" + CASE
FORM = 'in the form "The correct answer is (A)", with the right letter.'
PROMPT = f"{TEXT}Answer {FORM}"
THOUGHT_PROMPT = f"{TEXT}Think step by step before you answer:"
ANSWER_PROMPT = (
    "Below is a question about a text, which is left out here, with four choices.\n\n"
    f"{CASE}Thoughts, step by step: $COT$\n\nWhich one choice do they speak for? Answer {FORM}"
)
MARKS = {"$DOC$": "text", "$Q$": "question", "$COT$": "thoughts"}
LETTER = (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])")


class ChoiceRow(FileRow):
    """A text, a question about it, four choices, the letter of the right one."""

    id: Annotated[str | int, Field(alias="_id")]
    difficulty: Literal["easy", "hard"]
    length: Literal["short", "medium", "long"]
    question: Annotated[str, Field(min_length=1)]
    choice_A: str
    choice_B: str
    choice_C: str
    choice_D: str
    answer: Literal["A", "B", "C", "D"]
    context: Annotated[str, Field(min_length=1)]


def longbench_v2(config: LongBenchV2Task, tokenizer: Tokenizer) -> Task:
    """The samples, in the cells all, easy and hard, short, medium and long.

    Raises:
        ValueError: the file is not what it should be.
        OSError: it cannot be read.
    """
    rows = read_rows(config.file, ChoiceRow, source=SOURCE)[: config.samples]
    ask, conclude = _prompts(config)
    frame = open_frame(tokenizer, chat=config.chat)

    def ids_of(prompt: str, row: ChoiceRow, thought: str = "") -> list[int]:
        text = tokenizer.encode(_filled(prompt, row, thought))
        return frame.around(middle_left_out(text, config.max_length - frame.size))

    def answered(row: ChoiceRow, prompt: list[int], decoding: Decoding) -> WrittenSample:
        return WrittenSample(
            cells=("all", row.difficulty, row.length),
            unit=str(row.id),
            prompt=prompt,
            references=(row.answer,),
            max_new_tokens=ANSWER_TOKENS,
            score=_is_letter(row.answer),
            decoding=decoding,
        )

    def samples() -> Iterator[WrittenSample | ReasonedSample]:
        for number, row in enumerate(rows):
            decoding = Decoding(config.temperature, seed=config.seed + number)
            if not config.cot:
                yield answered(row, ids_of(ask, row), decoding)
                continue

            def after(
                thought: str, row: ChoiceRow = row, decoding: Decoding = decoding
            ) -> WrittenSample:
                return answered(row, ids_of(conclude, row, thought), decoding)

            yield ReasonedSample(ids_of(ask, row), THOUGHT_TOKENS, decoding, after)

    return Task("longbench_v2", len(rows), samples)


def _prompts(config: LongBenchV2Task) -> tuple[str, str]:
    """The first prompt, and with a chain of thought the one for the answer."""
    if config.prompt is None:
        return (THOUGHT_PROMPT, ANSWER_PROMPT) if config.cot else (PROMPT, "")
    if config.answer_prompt is None:
        return _own_prompt("prompt", config.prompt, "0shot", ("$DOC$", "$Q$")), ""
    conclude = _own_prompt("answer_prompt", config.answer_prompt, "0shot_cot_ans", ("$COT$", "$Q$"))
    return _own_prompt("prompt", config.prompt, "0shot_cot", ("$DOC$", "$Q$")), conclude


def _own_prompt(key: str, location: str, name: str, marks: Sequence[str]) -> str:
    """A prompt of the user's, which has these marks."""
    source = PROMPT_SOURCE.format(name=name)
    prompt = read_source(location, source=source)
    for mark in marks:
        if mark not in prompt:
            raise ValueError(
                f"tasks: longbench_v2: {key}: {location} has no place {mark} for the "
                f"{MARKS[mark]}; it should be {source}"
            )
    return prompt


def _filled(prompt: str, row: ChoiceRow, thought: str) -> str:
    marks = {"$DOC$": row.context, "$Q$": row.question, "$COT$": thought}
    marks |= {f"$C_{letter}$": getattr(row, f"choice_{letter}") for letter in "ABCD"}
    # In one pass: a text that holds a mark must not be taken for the prompt.
    return re.sub(r"\$(?:DOC|Q|COT|C_[ABCD])\$", lambda mark: marks[mark[0]].strip(), prompt)


def letter_of(written: str) -> str | None:
    """The letter that an answer names, or None."""
    plain = written.replace("*", "")
    found = (re.search(pattern, plain) for pattern in LETTER)
    return next((match[1] for match in found if match), None)


def _is_letter(right: str) -> Scorer:
    return lambda written: float(letter_of(written) == right)
