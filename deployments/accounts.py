"""What each API key has used, and whether it may use more now."""

import math
import time
from collections.abc import Callable

from deployments.errors import Failure
from deployments.keys import ApiKey


class Account:
    """The limits of one key, in one process.

    Tokens are paid when they are known: a request begins while anything is left, and what it then
    uses may put the account into debt, which time pays back.
    """

    def __init__(
        self, key: ApiKey, *, processes: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """processes: how many share the key's limits; each grants its part."""
        self.name = key.name
        self._clock = clock
        tokens, requests = key.tokens_per_minute, key.max_concurrent_requests
        self._capacity = None if tokens is None else tokens / processes
        self._max_open = None if requests is None else max(1, requests // processes)
        self._level = self._capacity or 0.0
        self._open = 0
        self._filled_s = clock()

    def enter(self) -> Failure | None:
        """Begin a request, which must leave() later; or why it may not begin."""
        if self._max_open is not None and self._open >= self._max_open:
            return _refused(
                f"{self._open} requests of {self.name} are open, and no more than {self._max_open} "
                "may be at once",
                code="concurrency_limit_exceeded",
                wait_s=1,
            )
        wait_s = self.wait_s()
        if wait_s > 0:
            return _refused(
                f"{self.name} has used up its {self._capacity:g} tokens per minute; try again in "
                f"{wait_s} s",
                code="rate_limit_exceeded",
                wait_s=wait_s,
            )
        self._open += 1
        return None

    def leave(self) -> None:
        """A request has ended."""
        self._open -= 1

    def charge(self, tokens: int) -> None:
        """Take tokens off the account."""
        self._fill()
        self._level -= tokens

    def wait_s(self) -> int:
        """Seconds until a request may begin, as far as tokens go."""
        self._fill()
        if self._capacity is None or self._level > 0:
            return 0
        return max(1, math.ceil(-self._level * 60 / self._capacity))

    def headers(self) -> dict[str, str]:
        """How much is left, as OpenAI tells it."""
        if self._capacity is None:
            return {}
        self._fill()
        missing = self._capacity - self._level
        return {
            "x-ratelimit-limit-tokens": str(int(self._capacity)),
            "x-ratelimit-remaining-tokens": str(max(0, int(self._level))),
            "x-ratelimit-reset-tokens": f"{math.ceil(missing * 60 / self._capacity)}s",
        }

    def _fill(self) -> None:
        now = self._clock()
        passed_s, self._filled_s = now - self._filled_s, now
        if self._capacity is not None:
            gained = passed_s * self._capacity / 60
            self._level = min(self._capacity, self._level + gained)


def _refused(message: str, *, code: str, wait_s: int) -> Failure:
    headers = {"Retry-After": str(wait_s)}
    return Failure(429, message, type="rate_limit_error", code=code, headers=headers)
