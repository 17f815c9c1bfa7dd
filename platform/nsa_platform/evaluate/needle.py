"""Needle in a haystack: what a model makes of numbers in a long text (data/haystack.py).

Three readings:

    exact   the model, generating freely, writes the number: the test as it is usually reported; of
            several numbers, the share that it writes
    tokens  share of the number's tokens that were most likely, the right ones before them given;
            tokens without a digit, as the blank before it, do not count
    lift    log p(number | needle) - log p(number | a needle with another number), in nats: what
            the needle's content is worth; 0 means that the needle was not read at all

Source: github.com/gkamradt/LLMTest_NeedleInAHaystack for the task; the judge there is a language
model, here it is equality.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress

from nsa_platform.config.evaluate import NeedleConfig
from nsa_platform.data.haystack import Counts, Haystack, haystack, synthetic_filler
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.prompt import Prompt, Write, in_groups
from nsa_platform.evaluate.scores import AnswerScore

ScoreAnswer = Callable[[list[int], list[int]], AnswerScore]


@dataclass(frozen=True, slots=True)
class Trial:
    """What the model made of one haystack."""

    length: int
    depth: float
    position: int
    number: str
    written: str
    exact: float
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
    write: Write,
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
    for group in in_groups(_sites(tokenizer, config, filler)):
        prompts = [Prompt(hay.prompt, len(hay.answer) + 2) for _, _, hay in group]
        trials: dict[int, Trial] = {}
        for place, ids in write(prompts):
            length, depth, hay = group[place]
            trials[place] = _trial(hay, ids, tokenizer, score, length=length, depth=depth)
            advance()
        grid.trials.extend(trials[place] for place in range(len(group)))
    return grid


def check_room(tokenizer: Tokenizer, config: NeedleConfig) -> None:
    """Make the shortest haystacks, so that what does not fit is known before a model is asked.

    Raises:
        ValueError: there is no room for needle and question.
    """
    shortest = config.model_copy(update={"lengths": (min(config.lengths),)})
    for _ in _sites(tokenizer, shortest, synthetic_filler(tokenizer)):
        pass


def _sites(
    tokenizer: Tokenizer, config: NeedleConfig, filler: Sequence[int]
) -> Iterator[tuple[int, float, Haystack]]:
    """Length and depth of every haystack, and the haystack."""
    counts = Counts(config.keys, config.values, config.queries)
    for length in config.lengths:
        for depth in config.depths:
            for sample in range(config.samples):
                dice = random.Random(f"{config.seed}/{length}/{depth}/{sample}")
                hay = haystack(
                    tokenizer, filler, length=length, depth=depth, dice=dice, counts=counts
                )
                yield length, depth, hay


def _trial(
    hay: Haystack,
    ids: list[int],
    tokenizer: Tokenizer,
    score: ScoreAnswer,
    *,
    length: int,
    depth: float,
) -> Trial:
    """ids: what the model wrote."""
    written = tokenizer.decode(ids)
    has_digit = [re.search(r"\d", tokenizer.decode([token])) for token in hay.answer]
    with_needle = score(hay.prompt, hay.answer)
    without = score(hay.control, hay.answer)
    return Trial(
        length=length,
        depth=depth,
        position=hay.position,
        number=hay.number,
        written=written,
        exact=_found(written, hay.number.split(", ")),
        tokens=_mean([float(hit) for hit in compress(with_needle.hits, has_digit)]),
        lift=sum(without.nats) - sum(with_needle.nats),
    )


def _found(written: str, numbers: Sequence[str]) -> float:
    """The share of the numbers that are written; a single one must come first."""
    if len(numbers) == 1:
        first = re.match(r"\s*(\d+)", written)
        return float(first is not None and first.group(1) == numbers[0])
    return len(set(numbers) & set(re.findall(r"\d+", written))) / len(set(numbers))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
