"""Try again what storage refuses, for a bounded time, and say so."""

import time
from collections.abc import Callable, Sequence

DELAYS_S = (1.0, 5.0, 20.0)


def retried(
    action: Callable[[], None],
    what: str,
    *,
    say: Callable[[str], None],
    delays_s: Sequence[float] = DELAYS_S,
    final: tuple[type[OSError], ...] = (),
) -> None:
    """Do it, and after an OSError again after each delay; each failure is said in one line.

    Args:
        final: errors that no waiting mends; they are raised at once.

    Raises:
        OSError: what the last try met.
    """
    for delay_s in delays_s:
        try:
            return action()
        except final:
            raise
        except OSError as error:
            say(f"{what} failed, next try in {delay_s:g} s: {first_line(error)}")
            time.sleep(delay_s)
    return action()


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its name if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
