"""RULER's needles: single 1-3, multikey 1-3, multivalue, multiquery, at exact lengths.

A needle says which value a key stands for. Haystacks: the noise of five sentences and other
needles, with a needle between any two lines, or essays, with needles inside of them at some of 40
depths. One value is asked for in the singular. The sentences are ours, what they say and how they
are laid out is RULER's. Without essays the noise stands for them, and needles have lines of their
own.

Source: arXiv 2404.06654, appendix B; github.com/NVIDIA/RULER, scripts/data/synthetic/niah.py.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nsa_platform import storage
from nsa_platform.config.tasks import NiahTask
from nsa_platform.data.haystack import SYNTHETIC, break_before
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.tasks.fitting import padded, repeated, too_short
from nsa_platform.evaluate.tasks.frame import Frame, open_frame
from nsa_platform.evaluate.tasks.ruler_scores import share_of
from nsa_platform.evaluate.tasks.task import Task, WrittenSample
from nsa_platform.evaluate.tasks.words import key_of_words, number_of_seven, random_uuid

ANSWER_TOKENS = 128
DEPTHS = 40
"""Needles lie at some of so many equal depths."""
NEEDLE = "A magic {value_name} of {key} is {value}."

Draw = Callable[[random.Random], str]


@dataclass(frozen=True, slots=True)
class Wording:
    """What stands before and after the haystack, and how the answer begins."""

    introduction: str
    question: str
    begun: str


ONE = Wording(
    "The text below hides a magic {value}. Keep it in mind: a question about it follows.\n",
    "\nWhich magic {value} of {keys} does the text above name?",
    " The magic {value} of {keys} that the text names is",
)
MANY = Wording(
    "The text below hides magic {value}s. Keep them in mind: a question about them follows.\n",
    "\nWhich magic {value}s of {keys} does the text above name?",
    " The magic {value}s of {keys} that the text names are",
)


@dataclass(frozen=True, slots=True)
class Shape:
    """What tells the eight kinds apart."""

    haystack: str = "essays"
    """noise, essays or needles."""
    key: Draw = key_of_words
    value: Draw = number_of_seven
    value_name: str = "number"
    keys: int = 1
    values: int = 1
    """Values of each key."""
    queries: int = 1
    """Keys that are asked for."""

    @property
    def wording(self) -> Wording:
        return ONE if self.queries * self.values == 1 else MANY


SHAPES = {
    "niah_single_1": Shape("noise"),
    "niah_single_2": Shape(),
    "niah_single_3": Shape(value=random_uuid, value_name="uuid"),
    "niah_multikey_1": Shape(keys=4),
    "niah_multikey_2": Shape("needles"),
    "niah_multikey_3": Shape("needles", key=random_uuid, value=random_uuid, value_name="uuid"),
    "niah_multivalue": Shape(values=4),
    "niah_multiquery": Shape(keys=4, queries=4),
}


def niah(config: NiahTask, tokenizer: Tokenizer) -> Task:
    """The samples of one kind of needles; prompt and room for the answer are `length` tokens.

    Raises:
        ValueError: a length is too short, or the folder of essays holds no text.
        OSError: it cannot be read.
    """
    shape, frame = SHAPES[config.kind], open_frame(tokenizer, chat=config.chat)
    haystack = _haystack(config, shape, tokenizer)

    def samples() -> Iterator[WrittenSample]:
        for length in sorted(config.lengths):
            for number in range(config.samples):
                dice = random.Random(f"{config.seed}/{config.kind}/{length}/{number}")
                yield _sample(config.kind, shape, tokenizer, frame, haystack, length, number, dice)

    return Task(config.kind, len(config.lengths) * config.samples, samples)


@dataclass(frozen=True, slots=True)
class Haystack:
    """The text that goes round until there is no more room, and where needles lie in it."""

    filler: Sequence[int]
    by_lines: bool = False
    """Needles lie between any two rounds of the filler, else at different depths."""
    inline: bool = False
    """Needles are sentences inside of the text, else lines of their own."""


def _haystack(config: NiahTask, shape: Shape, tokenizer: Tokenizer) -> Haystack:
    if shape.haystack == "essays" and config.essays is not None:
        return Haystack(_essays(tokenizer, config.essays), inline=True)
    return Haystack(tokenizer.encode(SYNTHETIC), by_lines=shape.haystack == "noise")


def _sample(
    kind: str,
    shape: Shape,
    tokenizer: Tokenizer,
    frame: Frame,
    haystack: Haystack,
    length: int,
    number: int,
    dice: random.Random,
) -> WrittenSample:
    keys = [shape.key(dice) for _ in range(shape.keys)]
    values = {key: [shape.value(dice) for _ in range(shape.values)] for key in keys}
    asked = dice.sample(keys, shape.queries)
    names = " and ".join([", ".join(asked[:-1]), asked[-1]] if len(asked) > 1 else asked)
    wording, inline = shape.wording, haystack.inline
    parts = (wording.introduction, wording.question, wording.begun)
    introduction, question, begun = (
        tokenizer.encode(part.format(value=shape.value_name, keys=names)) for part in parts
    )
    needles = [
        _needle(tokenizer, shape, key, value, inline=inline)
        for key in keys
        for value in values[key]
    ]
    dice.shuffle(needles)
    fixed = len(introduction) + len(question) + len(begun) + frame.size + ANSWER_TOKENS
    room = length - fixed
    needed = sum(map(len, needles)) + 1
    if room < needed:
        raise too_short(kind, length, fixed + needed)
    if shape.haystack == "needles":
        context = _among_needles(tokenizer, shape, needles, room, dice)
    else:
        context = _among_text(tokenizer, haystack, needles, room, dice)
    references = tuple(value for key in asked for value in values[key])
    return WrittenSample(
        cells=(str(length),),
        unit=f"{length}/{number}",
        prompt=frame.around([*introduction, *context, *question], begun),
        references=references,
        max_new_tokens=ANSWER_TOKENS,
        score=share_of(references),
    )


def _needle(
    tokenizer: Tokenizer, shape: Shape, key: str, value: str, *, inline: bool = False
) -> list[int]:
    sentence = NEEDLE.format(value_name=shape.value_name, key=key, value=value)
    return tokenizer.encode(f" {sentence}" if inline else f"{sentence}\n")


def _among_text(
    tokenizer: Tokenizer,
    haystack: Haystack,
    needles: list[list[int]],
    room: int,
    dice: random.Random,
) -> list[int]:
    """Needles behind the ends of lines, or of sentences at different depths."""
    filler = haystack.filler
    begin = dice.randrange(len(filler))
    text = repeated(filler, room - sum(map(len, needles)), begin)
    if haystack.by_lines:
        lines = range(-begin % len(filler), len(text) + 1, len(filler)) or [0]
        places = sorted(dice.choices(lines, k=len(needles)))
    else:
        depths = sorted(dice.sample(range(DEPTHS), len(needles)))
        places = [
            break_before(tokenizer, text, round(depth / (DEPTHS - 1) * len(text)), marks=".!?\n")
            for depth in depths
        ]
    result: list[int] = []
    for start, end, needle in zip([0, *places], places, needles, strict=False):
        result += [*text[start:end], *needle]
    return [*result, *text[places[-1] :]]


def _among_needles(
    tokenizer: Tokenizer,
    shape: Shape,
    needles: list[list[int]],
    room: int,
    dice: random.Random,
) -> list[int]:
    """Needles among as many other ones as there is room for."""
    others: list[list[int]] = []
    left = room - sum(map(len, needles))
    while len(each := _needle(tokenizer, shape, shape.key(dice), shape.value(dice))) <= left:
        others.append(each)
        left -= len(each)
    for needle in needles:
        others.insert(dice.randint(0, len(others)), needle)
    return padded(tokenizer, [token for each in others for token in each], room)


def _essays(tokenizer: Tokenizer, folder: str) -> list[int]:
    names = sorted(name for name in storage.list_names(folder) if name.endswith(".txt"))
    texts = (storage.read_text(storage.join(folder, name)) for name in names)
    ids = tokenizer.encode("\n".join(" ".join(text.split()) for text in texts))
    if not ids:
        raise ValueError(
            f"tasks: essays: {folder} holds no .txt file with text; RULER takes the essays of "
            "paulgraham.com, any plain prose will do"
        )
    return ids
