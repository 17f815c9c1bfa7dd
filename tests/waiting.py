"""Waiting for what must happen, however slow or busy the machine is."""

import time
from collections.abc import Callable
from typing import TypeVar

# The end of a wait for what never comes; whatever is only slow is faster by far.
PATIENCE_S = 300

Found = TypeVar("Found")


def eventually(look: Callable[[], Found | None], what: str, *, every_s: float = 0.05) -> Found:
    """What `look` finds as soon as it is true; fails when patience is over."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := look()):
        assert time.monotonic() < deadline, f"{what}: still {found!r} after {PATIENCE_S} s"
        time.sleep(every_s)
    return found
