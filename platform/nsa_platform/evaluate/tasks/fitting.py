"""Texts of exactly so many tokens: pieces are encoded apart and put together as ids."""

from collections.abc import Callable, Sequence

from nsa_platform.data.haystack import SYNTHETIC
from nsa_platform.data.tokenizer import Tokenizer


def padded(tokenizer: Tokenizer, ids: Sequence[int], size: int) -> list[int]:
    """`ids` made `size` long by sentences of the noise before them, cut where they are full."""
    missing = size - len(ids)
    return [*repeated(tokenizer.encode(SYNTHETIC), missing), *ids]


def repeated(filler: Sequence[int], size: int, begin: int = 0) -> list[int]:
    """`size` ids of a filler that goes round, from its place `begin` on."""
    return [filler[(begin + i) % len(filler)] for i in range(size)]


def largest(size_of: Callable[[int], int], room: int, low: int, high: int) -> int:
    """The largest number in [low, high] whose size is at most `room`; that of `low` is.

    Sizes grow, nearly in proportion: the next guess lies on the line between what is known.
    """
    if size_of(high) <= room:
        return high
    while high - low > 1:
        rise = size_of(high) - size_of(low)
        guess = low + (room - size_of(low)) * (high - low) // max(1, rise)
        middle = min(max(guess, low + 1), high - 1)
        low, high = (middle, high) if size_of(middle) <= room else (low, middle)
    return low


def too_short(kind: str, length: int, needed: int) -> ValueError:
    """The error of a length that leaves no room."""
    return ValueError(
        f"tasks: {kind}: lengths={length} must be at least {needed}, the tokens of its question, "
        "its answer and what is asked for"
    )
