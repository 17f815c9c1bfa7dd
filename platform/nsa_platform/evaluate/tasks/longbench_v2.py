"""LongBench v2: one of four choices about a text of 8,000 to 2 million words.

A question counts in the cell of all, in that of its difficulty and in that of its class of length.
The letter is read from "The correct answer is (X)".

Source: arXiv 2412.15204; github.com/THUDM/LongBench, pred.py.
"""

import re
from collections.abc import Iterator, Mapping

from nsa_platform import storage
from nsa_platform.config.tasks import LongBenchV2Task
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.tasks.frame import open_frame
from nsa_platform.evaluate.tasks.longbench import middle_left_out
from nsa_platform.evaluate.tasks.rows import read_rows
from nsa_platform.evaluate.tasks.task import Decoding, Scorer, Task, WrittenSample

SOURCE = "data.json of LongBench v2 (huggingface.co/datasets/THUDM/LongBench-v2)"
CHOICES = ("choice_A", "choice_B", "choice_C", "choice_D")
FIELDS = ("_id", "difficulty", "length", "question", *CHOICES, "answer", "context")
ANSWER_TOKENS = 128
PROMPT = (
    "Below is a text, and then a question about it with four choices.\n\n$DOC$\n\n"
    "Question: $Q$\n(A) $C_A$\n(B) $C_B$\n(C) $C_C$\n(D) $C_D$\n\n"
    'Answer in the form "The correct answer is (A)", with the right letter.'
)
LETTER = (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])")


def longbench_v2(config: LongBenchV2Task, tokenizer: Tokenizer) -> Task:
    """The samples, in the cells all, easy and hard, short, medium and long.

    Raises:
        ValueError: the file is not what it should be.
        OSError: it cannot be read.
    """
    rows = read_rows(config.file, FIELDS, source=SOURCE)[: config.samples]
    prompt = PROMPT if config.prompt is None else storage.read_text(config.prompt)
    frame = open_frame(tokenizer, chat=config.chat)

    def samples() -> Iterator[WrittenSample]:
        for number, row in enumerate(rows):
            text = tokenizer.encode(_filled(prompt, row))
            ids = middle_left_out(text, config.max_length - frame.size)
            yield WrittenSample(
                cells=("all", row["difficulty"], row["length"]),
                unit=str(row["_id"]),
                prompt=frame.around(ids),
                references=(row["answer"],),
                max_new_tokens=ANSWER_TOKENS,
                score=_is_letter(row["answer"]),
                decoding=Decoding(config.temperature, seed=config.seed + number),
            )

    return Task("longbench_v2", len(rows), samples)


def _filled(prompt: str, row: Mapping[str, str]) -> str:
    marks = {"$DOC$": "context", "$Q$": "question"}
    marks |= {f"$C_{letter}$": f"choice_{letter}" for letter in "ABCD"}
    # In one pass: a text that holds a mark must not be taken for the prompt.
    return re.sub(r"\$(?:DOC|Q|C_[ABCD])\$", lambda mark: row[marks[mark[0]]].strip(), prompt)


def letter_of(written: str) -> str | None:
    """The letter that an answer names, or None."""
    plain = written.replace("*", "")
    found = (re.search(pattern, plain) for pattern in LETTER)
    return next((match[1] for match in found if match), None)


def _is_letter(right: str) -> Scorer:
    return lambda written: float(letter_of(written) == right)
