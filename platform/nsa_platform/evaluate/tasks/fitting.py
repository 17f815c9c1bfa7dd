"""Texts of exactly so many tokens: pieces are encoded apart and put together as ids."""

from collections.abc import Callable, Sequence

from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.needle import SYNTHETIC


def padded(tokenizer: Tokenizer, ids: Sequence[int], size: int) -> list[int]:
    """`ids` made `size` long by sentences of the noise before them, cut where they are full."""
    missing = size - len(ids)
    return [*repeated(tokenizer.encode(SYNTHETIC), missing), *ids]


def repeated(filler: Sequence[int], size: int, begin: int = 0) -> list[int]:
    """`size` ids of a filler that goes round, from its place `begin` on."""
    return [filler[(begin + i) % len(filler)] for i in range(size)]


def largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in [low, high] that fits, if all below it do; `low` fits."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def too_short(kind: str, length: int, needed: int) -> ValueError:
    """The error of a length that leaves no room."""
    return ValueError(
        f"tasks: {kind}: lengths={length} must be at least {needed}, the tokens of its question, "
        "its answer and what is asked for"
    )
