"""How a function is run on many jobs: here, or wherever the caller has it done."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


class Each(Protocol):
    """Runs a function on every job, somewhere, and hands on results as they come."""

    def __call__(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], /
    ) -> Iterator[Result]: ...


def in_turn(function: Callable[[Job], Result], jobs: Sequence[Job], /) -> Iterator[Result]:
    """The simplest `each`: here, one after the other."""
    return map(function, jobs)
