"""Words and numbers that generators draw from: English words by kind, keys, values, codes."""

import functools
import json
import random
import string
import uuid
from collections.abc import Iterator

import wonderwords


@functools.cache
def english(*kinds: str) -> tuple[str, ...]:
    """English words of some kinds (noun, adjective, verb), sorted, each once."""
    words = wonderwords.RandomWord().filter(include_categories=list(kinds))
    return tuple(sorted({word.lower() for word in words}))


def key_of_words(dice: random.Random) -> str:
    """An adjective and a noun, joined by a dash."""
    return f"{dice.choice(english('adjective'))}-{dice.choice(english('noun'))}"


def number_of_seven(dice: random.Random) -> str:
    """A number of seven digits."""
    return str(dice.randint(1_000_000, 9_999_999))


def random_uuid(dice: random.Random) -> str:
    """A UUID of version 4."""
    return str(uuid.UUID(int=dice.getrandbits(128), version=4))


def uuid_pairs(dice: random.Random, count: int) -> str:
    """A JSON object of UUIDs that stand for UUIDs, and a question for one of them."""
    pairs = {random_uuid(dice): random_uuid(dice) for _ in range(count)}
    asked = dice.choice(list(pairs))
    return f'Values of keys:\n{json.dumps(pairs)}\n\nKey: "{asked}"\nIts value:'


def codes(dice: random.Random, letters: str, length: int) -> Iterator[str]:
    """Different random words of `length` letters, without end while there are any."""
    seen: set[str] = set()
    while True:
        word = "".join(dice.choices(letters, k=length))
        if word not in seen:
            seen.add(word)
            yield word


LOWER, UPPER = string.ascii_lowercase, string.ascii_uppercase
