"""A service on this machine: a process with a health check, a log and a clean stop."""

import os
import pwd
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

START_PATIENCE_S = 120.0
LEFTOVER_PATIENCE_S = 2.0
LOG_TAIL_LINES = 15


class ServiceError(RuntimeError):
    """A service did not start or has ended; the message has the end of its log."""


@dataclass(slots=True)
class Service:
    """One process, started in a session of its own, so that Ctrl-C reaches only who stops it."""

    name: str
    command: Sequence[str]
    log: Path
    is_healthy: Callable[[], bool]
    """Asked again and again after the start; whatever OSError it raises is a no."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's own."""
    folder: Path | None = None
    """Working directory; None: this process's."""
    user: str | None = None
    """Whom it runs as; None: as this process."""
    stop_signal: signal.Signals = signal.SIGTERM
    stop_patience_s: float = 30.0
    """After this, what is left of it is killed."""
    process: subprocess.Popen[Any] | None = None

    def start(self) -> None:
        """Start the process; its output goes to the log.

        Raises:
            ServiceError: the program cannot be executed.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.log.open("wb") as output:
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd=self.folder,
                    env={**os.environ, **self.environment},
                    start_new_session=True,
                    **identity(self.user),
                )
        except OSError as error:
            raise ServiceError(f"{self.name}: {self.command[0]}: {error.strerror}") from None

    def wait_until_healthy(self) -> None:
        """Return when it answers.

        Raises:
            ServiceError: it ends, or does not answer in time.
        """
        deadline = time.monotonic() + START_PATIENCE_S
        while not self._answers():
            self.check()
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"{self.name} does not answer after {START_PATIENCE_S:.0f} s:\n{self._tail()}"
                )
            time.sleep(0.2)

    def check(self) -> None:
        """Raise ServiceError if the process has ended."""
        status = None if self.process is None else self.process.poll()
        if status is not None:
            raise ServiceError(f"{self.name} has ended with status {status}:\n{self._tail()}")

    def stop(self) -> None:
        """End the process and all that it started; at once if it is not running."""
        if self.process is None:
            return
        family = family_of(self.process.pid)
        if self.process.poll() is None:
            self.process.send_signal(self.stop_signal)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(self.stop_patience_s)
        end_all(family)
        self.process.wait()
        self.process = None

    def _answers(self) -> bool:
        try:
            return self.is_healthy()
        except OSError:
            return False

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([*(f"  {line}" for line in lines), f"  (all of it: {self.log})"])


def identity(user: str | None) -> dict[str, Any]:
    """Arguments of Popen that make a child run as `user`, with the user's own group alone."""
    if user is None:
        return {}
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


def family_of(pid: int) -> list[psutil.Process]:
    """A process and all below it; none if it is gone."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; one that has ended and waits for its parent to hear of it does not."""
    # A pid that another process has taken since is not it: psutil compares start times.
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def end_all(processes: Sequence[psutil.Process]) -> None:
    """Terminate what is left of these processes, then kill what does not heed it."""
    for end in (psutil.Process.terminate, psutil.Process.kill):
        left = [process for process in processes if is_alive(process)]
        for process in left:
            with suppress(psutil.NoSuchProcess):
                end(process)
        deadline = time.monotonic() + LEFTOVER_PATIENCE_S
        while any(map(is_alive, left)) and time.monotonic() < deadline:
            time.sleep(0.05)
