"""What a task is: samples in cells, each with a prompt and a way to score what a model makes of it.

A cell is what one number is reported for: a length, a dataset, a limit of the answer. A sample may
count in several; a task's mean is taken over those that come first. Samples of one unit vary
together, such as several tries at one problem.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nsa_platform.evaluate.prompt import GREEDY, Decoding

Scorer = Callable[[str], float]
"""What a model wrote to its score, 0 to 1."""


@dataclass(frozen=True, slots=True)
class WrittenSample:
    """The model writes an answer to a prompt."""

    cells: tuple[str, ...]
    unit: str
    prompt: list[int]
    references: tuple[str, ...]
    max_new_tokens: int
    score: Scorer
    decoding: Decoding = GREEDY


@dataclass(frozen=True, slots=True)
class ForcedSample:
    """The model is given the answer token by token; some of its tokens count."""

    cells: tuple[str, ...]
    unit: str
    prompt: list[int]
    answer: list[int]
    counted: tuple[int, ...]
    """Places in the answer; the score is the share of them that were the likeliest token."""


@dataclass(frozen=True, slots=True)
class ReasonedSample:
    """The model thinks first, and is asked for the answer in a second prompt."""

    prompt: list[int]
    max_new_tokens: int
    decoding: Decoding
    conclude: Callable[[str], WrittenSample]
    """What it thought to the sample that is scored."""


Sample = WrittenSample | ForcedSample | ReasonedSample


@dataclass(frozen=True, slots=True)
class Task:
    """A named set of samples. Asked again, `samples` gives the same ones."""

    name: str
    size: int
    """How many samples there are."""
    samples: Callable[[], Iterator[Sample]]
