"""What a model is asked to write: prompts in groups, and the callable that stands for the model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")

GROUP_SIZE = 256
"""Prompts that are asked together: some batches of an engine, and not too many for the memory."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How an answer is drawn; the default is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Decoding()


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ids that the model is to go on from, and how."""

    ids: list[int]
    max_new_tokens: int
    decoding: Decoding = GREEDY
    stops: tuple[str, ...] = ()
    """Behind the first of these texts nothing of the answer counts: it may end there, or go on."""


Write = Callable[[Sequence[Prompt]], Iterator[tuple[int, list[int]]]]
"""Prompts to the place of each among them and the ids that the model writes, a stop id left out:
as answers are done, in whatever order. It is read to its end before it is called again."""


def one_by_one(answer: Callable[[Prompt], list[int]]) -> Write:
    """A model that answers one prompt after the other."""
    return lambda prompts: enumerate(map(answer, prompts))


def in_groups(items: Iterable[Item], size: int = GROUP_SIZE) -> Iterator[list[Item]]:
    """Items in lists of `size`, the last one perhaps shorter; no list is made before its turn."""
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group
