"""One process at a time: a lock file whose lock ends with the process that holds it."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path


class InUseError(RuntimeError):
    """Another process holds the lock; the message says which."""


@contextmanager
def alone(path: Path, *, what: str) -> Iterator[None]:
    """Hold the lock for the block. The file stays; it says who held it last.

    Args:
        what: what is being done by whoever holds the lock, for the message.

    Raises:
        InUseError: it is held already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InUseError(f"{what} already: {file.read().strip()}") from None
        file.truncate(0)
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}")
        file.flush()
        yield
