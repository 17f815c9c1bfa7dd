"""The command line that jobs share: --config, --set, --dry-run, and records to draw again."""

import argparse
import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from rich.console import Console
from rich.syntax import Syntax

from nsa_platform.config.base import ConfigError, Strict
from nsa_platform.config.describe import describe
from nsa_platform.config.locations import resolve_locations

Run = TypeVar("Run", bound=Strict)

EXIT_BAD_CONFIG = 2
EXIT_INTERRUPTED = 130
MAX_PORT = 65535


class FlagParser(argparse.ArgumentParser):
    """A wrong flag ends the process as a wrong key does: status 2 and a line, without the usage."""

    def error(self, message: str) -> NoReturn:
        fail(message, status=EXIT_BAD_CONFIG)


def parser(root: type[Strict], doc: str) -> argparse.ArgumentParser:
    """The parser of a job whose YAML is a `root`; --help lists every field of it."""
    result = FlagParser(
        description=doc,
        epilog="Keys of the YAML file:\n\n" + describe(root),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--config", required=True, metavar="X.yaml", help="the run")
    result.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=value",
        dest="overrides",
        help="patch one key before validation; may be given again",
    )
    result.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and stop"
    )
    return result


def read_record(path: Path) -> dict[str, Any]:
    """A stored record of measured figures.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is not JSON") from None
    if not isinstance(record, dict) or "records" not in record:
        raise ValueError(f"{path} holds no measured figures")
    return record


def record_arguments(result: argparse.ArgumentParser) -> None:
    """Where a job that makes a record is told to leave it and its picture; by itself it prints."""
    result.add_argument("--json", type=Path, metavar="PATH", help="write the record here")
    result.add_argument("--picture", type=Path, metavar="PATH.png", help="draw it here")
    result.add_argument("--draw", type=Path, metavar="JSON", help="only draw this record again")


def write_record(record: dict[str, Any], path: Path) -> None:
    """Write a record of measured figures, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_run(root: type[Run], doc: str, argv: Sequence[str] | None = None) -> tuple[Run, bool]:
    """Parse the command line and the YAML, make places absolute, print the resolved configuration.

    Returns the run and whether --dry-run was given. A wrong configuration ends the process with
    exit status 2 and one line for each problem on standard error; nothing has been started.
    """
    arguments = parser(root, doc).parse_args(argv)
    try:
        run = resolve_locations(root.load(arguments.config, arguments.overrides), Path.cwd())
    except ConfigError as error:
        fail(str(error), status=EXIT_BAD_CONFIG)
    describe_run(run)
    return run, arguments.dry_run


def describe_run(run: Strict) -> None:
    """Print the resolved configuration."""
    Console().print(Syntax(run.to_yaml(), "yaml", background_color="default", word_wrap=True))


@contextmanager
def interruptible(line: str = "interrupted; the same command goes on from here") -> Iterator[None]:
    """End the process with status 130 and the line if it is interrupted inside the block.

    SIGTERM counts as an interruption: whoever stops a job lets it end its run and its processes.
    """
    try:
        with _terminated_as_interrupted():
            yield
    except KeyboardInterrupt:
        fail(line, status=EXIT_INTERRUPTED)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_: int, __: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def port_number(text: str) -> int:
    """A TCP port of a command line; 0 where any free one will do."""
    if not text.isdecimal() or int(text) > MAX_PORT:
        raise argparse.ArgumentTypeError(f"must be a port from 0 to {MAX_PORT}, got {text!r}")
    return int(text)


def warn(message: str) -> None:
    """`warning: message` on standard error."""
    print(f"warning: {message}", file=sys.stderr)


def fail(message: str, *, status: int = 1) -> NoReturn:
    """End the process with `error: message` on standard error."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)
