"""Haystacks: long prompts with lines that hold numbers, and a question for some of them.

Prompt = filler, needle, filler, question; exactly `length` tokens. The needle goes in at `depth` of
the filler and then back to the line end before it. Several needles that are asked for go on from
there in equal steps to the end; those of words that are not asked for lie anywhere.

Source: github.com/gkamradt/LLMTest_NeedleInAHaystack for the task.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from nsa_platform.data.tokenizer import Tokenizer

NEEDLE = "\nThe secret number of {word} is {number}.\n"
QUESTION = "\nThe secret number of {word} is"
QUESTION_FOR_SEVERAL = "\nThe secret numbers of {word} are"
ANSWER = " {number}"
WORDS = (
    *("anchor", "basil", "candle", "dragon", "ember", "falcon", "garnet", "harbor", "island"),
    *("jacket", "kettle", "lantern", "marble", "needle", "orchard", "pepper", "quartz", "ribbon"),
    *("saddle", "timber", "umbrella", "velvet", "willow", "yellow", "zephyr"),
)
SYNTHETIC = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
LINE_END_REACH = 64
"""The needle moves back by at most so many tokens to stand after a line end."""


@dataclass(frozen=True, slots=True)
class Haystack:
    """One prompt and what should follow it."""

    prompt: list[int]
    control: list[int]
    """The same prompt with other numbers in the needles that are asked for."""
    answer: list[int]
    number: str
    """What is asked for; several numbers are joined by a comma and a blank."""
    position: int
    """Where the first needle that is asked for begins, in tokens."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How many needles there are."""

    keys: int = 1
    values: int = 1
    queries: int = 1


ONE_NEEDLE = Counts()


def haystack(
    tokenizer: Tokenizer,
    filler: Sequence[int],
    *,
    length: int,
    depth: float,
    dice: random.Random,
    counts: Counts = ONE_NEEDLE,
) -> Haystack:
    """A prompt of exactly `length` tokens with a needle at `depth`.

    Raises:
        ValueError: the filler is empty, or `length` has no room for needles and question.
    """
    if not filler:
        raise ValueError("the haystack needs filler, got no token")
    words = dice.sample(WORDS, counts.keys)
    asked = words[: counts.queries]
    pairs = [(word, *_two_numbers(dice)) for word in words for _ in range(counts.values)]
    wanted = pairs[: counts.queries * counts.values]
    question = _question(tokenizer, asked, len(wanted))
    needles, controls, others = (
        [tokenizer.encode(NEEDLE.format(word=pair[0], number=pair[which])) for pair in some]
        for some, which in ((wanted, 1), (wanted, 2), (pairs[len(wanted) :], 1))
    )
    size = max(sum(map(len, needles)), sum(map(len, controls))) + sum(map(len, others))
    room = length - len(question) - size
    if room < 1:
        raise ValueError(
            f"needle.lengths={length} must be more than {length - room}, "
            "the tokens of needle and question"
        )
    begin = dice.randrange(len(filler))
    hay = [filler[(begin + i) % len(filler)] for i in range(length)]
    steps = [depth + (1 - depth) * i / len(wanted) for i in range(len(wanted))]
    places = [break_before(tokenizer, hay, round(step * room)) for step in steps]
    elsewhere = [break_before(tokenizer, hay, dice.randint(0, room)) for _ in others]

    def around(middle: list[list[int]]) -> list[int]:
        at = sorted(
            zip([*places, *elsewhere], [*middle, *others], strict=True), key=lambda each: each[0]
        )
        rest = length - len(question) - sum(map(len, [*middle, *others]))
        starts, result = [0, *(place for place, _ in at)], []
        for start, (place, needle) in zip(starts, at, strict=False):
            result += [*hay[start:place], *needle]
        return [*result, *hay[starts[-1] : rest], *question]

    number = ", ".join(pair[1] for pair in wanted)
    earlier = [needle for needle, place in zip(others, elsewhere, strict=True) if place < places[0]]
    return Haystack(
        prompt=around(needles),
        control=around(controls),
        answer=tokenizer.encode(ANSWER.format(number=number)),
        number=number,
        position=places[0] + sum(map(len, earlier)),
    )


def _two_numbers(dice: random.Random) -> tuple[str, str]:
    return str(dice.randint(10_000, 99_999)), str(dice.randint(10_000, 99_999))


def _question(tokenizer: Tokenizer, asked: Sequence[str], numbers: int) -> list[int]:
    template = QUESTION if numbers == 1 else QUESTION_FOR_SEVERAL
    return tokenizer.encode(template.format(word=" and ".join(asked)))


def synthetic_filler(tokenizer: Tokenizer) -> list[int]:
    """Ids of five plain sentences that say nothing of numbers."""
    return tokenizer.encode(SYNTHETIC)


def break_before(tokenizer: Tokenizer, hay: Sequence[int], place: int, *, marks: str = "\n") -> int:
    """The nearest place at or before `place` after one of the marks; `place` if none is near."""
    for candidate in range(place, max(0, place - LINE_END_REACH), -1):
        if any(mark in tokenizer.decode(hay[candidate - 1 : candidate]) for mark in marks):
            return candidate
    return place
