"""One HTTP request from its arrival to its end: its id, whose it is, what it used, its log line."""

import json
import logging
import sys
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from fastapi import Request

from deployments.accounts import Account
from deployments.backend import Spent

LOGGER = logging.getLogger("nsa.requests")
MAX_ID = 128


@dataclass(slots=True)
class Visit:
    """What is known of a request while it is answered."""

    request_id: str
    method: str
    path: str
    account: Account | None = None
    model: str | None = None
    body: dict[str, Any] | None = None
    """What was asked, if that is to be logged."""
    spent: Spent = field(default_factory=Spent)
    status: int = 0
    """0: the client left before there was one."""
    error: str | None = None
    """Code of the refusal, or of what broke a stream off."""
    begun_s: float = field(default_factory=time.monotonic)
    first_byte_s: float | None = None
    """From arrival to the first part of the answer's body."""
    is_open: bool = False
    """Whether it counts among the open requests of its key."""

    def leave(self) -> None:
        """Let the key's next request in; as often as one likes."""
        if self.account is not None and self.is_open:
            self.is_open = False
            self.account.leave()

    def spend(self, spent: Spent) -> None:
        """Count tokens, and take them off the key's account."""
        self.spent += spent
        if self.account is not None:
            self.account.charge(spent.prompt_tokens + spent.completion_tokens)

    def line(self) -> str:
        """The request as one line of JSON; what was asked only if it was kept."""
        record: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": self.request_id,
            "key": None if self.account is None else self.account.name,
            "method": self.method,
            "path": self.path,
            "model": self.model,
            "status": self.status,
            "error": self.error,
            "prompt_tokens": self.spent.prompt_tokens,
            "cached_tokens": self.spent.cached_tokens,
            "completion_tokens": self.spent.completion_tokens,
            "first_byte_s": None if self.first_byte_s is None else round(self.first_byte_s, 4),
            "duration_s": round(time.monotonic() - self.begun_s, 4),
        }
        if self.body is not None:
            record["body"] = self.body
        return json.dumps(record)


def new_request_id(asked: str | None) -> str:
    """The client's own id if it can stand in a header and a log, else a fresh one."""
    if asked and len(asked) <= MAX_ID and all("!" <= letter <= "~" for letter in asked):
        return asked
    return uuid.uuid4().hex


def visit_of(request: Request) -> Visit:
    """The visit that the gate has opened for a request."""
    return request.state.visit


def log_to_stdout() -> None:
    """Write the lines of all visits to stdout, and nowhere else. Once in a process."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.handlers = [handler]
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
