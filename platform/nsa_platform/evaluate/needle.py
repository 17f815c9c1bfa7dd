"""Needle in a haystack: one line with a number in a long text, and a question for the number.

Prompt = filler, needle, filler, question; exactly `length` tokens. The needle goes in at `depth` of
the filler and then back to the line end before it. Three readings of the same needles:

    exact   the model, generating freely, writes the number: the test as it is usually reported
    tokens  share of the number's tokens that were most likely, the right ones before them given
    lift    log p(number | needle) - log p(number | a needle with another number), in nats: what
            the needle's content is worth; 0 means that the needle was not read at all

Source: github.com/gkamradt/LLMTest_NeedleInAHaystack for the task; the judge there is a language
model, here it is equality.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nsa_platform.config.evaluate import NeedleConfig
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.scores import AnswerScore

Generate = Callable[[list[int], int], list[int]]
"""Prompt ids and a number of tokens to the ids that the model writes, greedily."""
ScoreAnswer = Callable[[list[int], list[int]], AnswerScore]

NEEDLE = "\nThe secret number of {word} is {number}.\n"
QUESTION = "\nThe secret number of {word} is"
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
    """The same prompt with another number in its needle."""
    answer: list[int]
    number: str
    position: int
    """Where the needle begins, in tokens."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What the model made of one haystack."""

    length: int
    depth: float
    position: int
    number: str
    written: str
    exact: bool
    tokens: float
    lift: float


@dataclass(frozen=True, slots=True)
class NeedleGrid:
    """All trials, and their means over each cell."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: list[Trial] = field(default_factory=list)

    def mean(self, reading: str) -> float:
        """Mean of `exact`, `tokens` or `lift` over all trials."""
        return _mean([float(getattr(trial, reading)) for trial in self.trials])

    def cells(self, reading: str) -> list[list[float]]:
        """Means of a reading: one row for each depth, one column for each length."""
        return [
            [
                _mean(
                    [
                        float(getattr(trial, reading))
                        for trial in self.trials
                        if (trial.length, trial.depth) == (length, depth)
                    ]
                )
                for length in self.lengths
            ]
            for depth in self.depths
        ]


def needle_grid(
    generate: Generate,
    score: ScoreAnswer,
    tokenizer: Tokenizer,
    config: NeedleConfig,
    *,
    filler: Sequence[int],
    advance: Callable[[], None] = lambda: None,
) -> NeedleGrid:
    """Try every length and depth `config.samples` times. The same seed gives the same prompts.

    Args:
        filler: ids of text for the haystack; repeated if it is too short.
        advance: called when a trial is done.

    Raises:
        ValueError: the filler is empty, or a length has no room for needle and question.
    """
    grid = NeedleGrid(config.lengths, config.depths)
    for length in config.lengths:
        for depth in config.depths:
            for sample in range(config.samples):
                dice = random.Random(f"{config.seed}/{length}/{depth}/{sample}")
                hay = haystack(tokenizer, filler, length=length, depth=depth, dice=dice)
                grid.trials.append(
                    _try(generate, score, tokenizer, hay, length=length, depth=depth)
                )
                advance()
    return grid


def haystack(
    tokenizer: Tokenizer, filler: Sequence[int], *, length: int, depth: float, dice: random.Random
) -> Haystack:
    """A prompt of exactly `length` tokens with a needle at `depth`.

    Raises:
        ValueError: the filler is empty, or `length` has no room for needle and question.
    """
    if not filler:
        raise ValueError("the haystack needs filler, got no token")
    word = dice.choice(WORDS)
    number, other = (str(dice.randint(10_000, 99_999)) for _ in range(2))
    question = tokenizer.encode(QUESTION.format(word=word))
    needle = tokenizer.encode(NEEDLE.format(word=word, number=number))
    control = tokenizer.encode(NEEDLE.format(word=word, number=other))
    room = length - len(question) - max(len(needle), len(control))
    if room < 1:
        raise ValueError(
            f"needle.lengths={length} must be more than {length - room}, "
            "the tokens of needle and question"
        )
    begin = dice.randrange(len(filler))
    hay = [filler[(begin + i) % len(filler)] for i in range(room + abs(len(needle) - len(control)))]
    place = _line_start(tokenizer, hay, round(depth * room))

    def around(middle: list[int]) -> list[int]:
        rest = length - len(question) - len(middle)
        return [*hay[:place], *middle, *hay[place:rest], *question]

    return Haystack(
        prompt=around(needle),
        control=around(control),
        answer=tokenizer.encode(ANSWER.format(number=number)),
        number=number,
        position=place,
    )


def synthetic_filler(tokenizer: Tokenizer) -> list[int]:
    """Ids of five plain sentences that say nothing of numbers."""
    return tokenizer.encode(SYNTHETIC)


def _line_start(tokenizer: Tokenizer, hay: Sequence[int], place: int) -> int:
    """The nearest place at or before `place` that follows a line end; `place` if none is near."""
    for candidate in range(place, max(0, place - LINE_END_REACH), -1):
        if "\n" in tokenizer.decode(hay[candidate - 1 : candidate]):
            return candidate
    return place


def _try(
    generate: Generate,
    score: ScoreAnswer,
    tokenizer: Tokenizer,
    hay: Haystack,
    *,
    length: int,
    depth: float,
) -> Trial:
    with_needle = score(hay.prompt, hay.answer)
    without = score(hay.control, hay.answer)
    written = tokenizer.decode(generate(hay.prompt, len(hay.answer) + 2))
    found = re.match(r"\s*(\d+)", written)
    return Trial(
        length=length,
        depth=depth,
        position=hay.position,
        number=hay.number,
        written=written,
        exact=found is not None and found.group(1) == hay.number,
        tokens=_mean([float(hit) for hit in with_needle.hits]),
        lift=sum(without.nats) - sum(with_needle.nats),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
