"""RULER's question answering: the documents that hold the answer among others of the same file.

qa_1 reads SQuAD 2.0's dev-v2.0.json (questions that have an answer; other paragraphs of the same
article come first as distractors), qa_2 HotpotQA's hotpot_dev_distractor_v1.json. Documents are
added while they fit, then shuffled. Sentences are ours.

Source: arXiv 2404.06654, section 3; github.com/NVIDIA/RULER, scripts/data/synthetic/qa.py.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nsa_platform.config.tasks import QaTask
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.tasks.fitting import padded, too_short
from nsa_platform.evaluate.tasks.frame import Frame, open_frame
from nsa_platform.evaluate.tasks.rows import read_source
from nsa_platform.evaluate.tasks.ruler_scores import any_of
from nsa_platform.evaluate.tasks.task import Task, WrittenSample

ANSWER_TOKENS = 32
SOURCES = {
    "qa_1": "dev-v2.0.json of SQuAD 2.0 (rajpurkar.github.io/SQuAD-explorer)",
    "qa_2": "hotpot_dev_distractor_v1.json of HotpotQA (hotpotqa.github.io)",
}
ORDER = "Answer the question from the documents. Write the answer and nothing else."
INTRODUCTION = f"{ORDER}\n\nThe documents:"
DOCUMENT = "\n\nDocument {number}:\n{text}"
QUESTION = "\n\n" + ORDER + "\n\nQuestion: {question}"
BEGUN = " Answer:"


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its answers, and documents by their place in the file's list."""

    text: str
    answers: tuple[str, ...]
    holding: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Collection:
    """Documents, each once, and the questions about them."""

    documents: list[str]
    questions: list[Question]


def documents_qa(config: QaTask, tokenizer: Tokenizer) -> Task:
    """The samples; prompt and room for the answer are `length` tokens.

    Raises:
        ValueError: the file is not what it should be, or a length is too short for a question's
            own documents.
        OSError: it cannot be read.
    """
    frame, collection = open_frame(tokenizer, chat=config.chat), _read(config)
    asked = list(range(len(collection.questions)))
    random.Random(f"{config.seed}/{config.kind}").shuffle(asked)
    asked = asked[: config.samples]

    def samples() -> Iterator[WrittenSample]:
        for length in sorted(config.lengths):
            for number in asked:
                dice = random.Random(f"{config.seed}/{config.kind}/{length}/{number}")
                question = collection.questions[number]
                yield _sample(
                    config.kind, collection, question, tokenizer, frame, length, number, dice
                )

    return Task(config.kind, len(config.lengths) * len(asked), samples)


def _sample(
    kind: str,
    collection: Collection,
    question: Question,
    tokenizer: Tokenizer,
    frame: Frame,
    length: int,
    number: int,
    dice: random.Random,
) -> WrittenSample:
    begun = tokenizer.encode(BEGUN)
    ending = tokenizer.encode(QUESTION.format(question=question.text))
    fixed = len(tokenizer.encode(INTRODUCTION)) + len(ending) + len(begun) + frame.size
    room = length - fixed - ANSWER_TOKENS
    chosen: list[int] = []
    used = 0
    for index in _candidates(collection, question, dice):
        # Its final number is not known yet; those of the largest list are longest.
        text = DOCUMENT.format(number=len(collection.documents), text=collection.documents[index])
        size = len(tokenizer.encode(text))
        if used + size > room:
            if index in question.holding:
                raise too_short(kind, length, length - room + used + size)
            break
        chosen.append(index)
        used += size
    dice.shuffle(chosen)
    context = [
        token
        for place, index in enumerate(chosen, 1)
        for token in tokenizer.encode(
            DOCUMENT.format(number=place, text=collection.documents[index])
        )
    ]
    text = [*tokenizer.encode(INTRODUCTION), *context]
    text = padded(tokenizer, text, room + len(tokenizer.encode(INTRODUCTION)))
    return WrittenSample(
        cells=(str(length),),
        unit=f"{length}/{number}",
        prompt=frame.around([*text, *ending], begun),
        references=question.answers,
        max_new_tokens=ANSWER_TOKENS,
        score=any_of(question.answers),
    )


def _candidates(collection: Collection, question: Question, dice: random.Random) -> Iterator[int]:
    """Documents that hold the answer, then near ones, then all others, in random order."""
    yield from question.holding
    yield from dice.sample(question.near, len(question.near))
    taken = {*question.holding, *question.near}
    others = [index for index in range(len(collection.documents)) if index not in taken]
    yield from dice.sample(others, len(others))


def _read(config: QaTask) -> Collection:
    text = read_source(config.file, source=SOURCES[config.kind])
    try:
        tree = json.loads(text)
        collection = _squad(tree) if config.kind == "qa_1" else _hotpot(tree)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"tasks: {config.kind}: {config.file} is not {SOURCES[config.kind]}: {_said(error)}"
        ) from None
    if not collection.questions:
        raise ValueError(
            f"tasks: {config.kind}: {config.file} holds no question that has an answer; it should "
            f"be {SOURCES[config.kind]}"
        )
    return collection


def _said(error: ValueError | KeyError | TypeError) -> str:
    match error:
        case KeyError():
            return f"it has no {error} where that has one"
        case TypeError():
            return "it has a list where that has an object, or the other way round"
        case _:
            return str(error)


def _squad(tree: Any) -> Collection:
    paragraphs = [p["context"] for article in tree["data"] for p in article["paragraphs"]]
    documents = sorted(set(paragraphs))
    place = {text: index for index, text in enumerate(documents)}
    questions = []
    for article in tree["data"]:
        all_of_it = [place[paragraph["context"]] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            own = place[paragraph["context"]]
            near = tuple(sorted({index for index in all_of_it if index != own}))
            questions += [
                Question(qa["question"], tuple(a["text"] for a in qa["answers"]), (own,), near)
                for qa in paragraph["qas"]
                if not qa["is_impossible"]
            ]
    return Collection(documents, questions)


def _hotpot(tree: Any) -> Collection:
    texts = [[f"{title}\n{''.join(lines)}" for title, lines in row["context"]] for row in tree]
    documents = sorted({text for row in texts for text in row})
    place = {text: index for index, text in enumerate(documents)}
    questions = [
        Question(row["question"], (row["answer"],), tuple(place[text] for text in own))
        for row, own in zip(tree, texts, strict=True)
    ]
    return Collection(documents, questions)
