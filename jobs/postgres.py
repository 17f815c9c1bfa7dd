"""A PostgreSQL server of its own folder and its own password, from the system's programs."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from jobs.ports import LOOPBACK
from jobs.services import Service, ServiceError, identity

PROGRAMS = ("initdb", "postgres", "pg_isready")
DEBIAN_FOLDER = Path("/usr/lib/postgresql")
DATABASE_USER = "mlflow"
DATABASE = "postgres"
# PostgreSQL refuses to run as root; these can be had on any system, the first where it is packaged.
UNPRIVILEGED = ("postgres", "nobody")


def find_programs() -> Path:
    """Folder of PostgreSQL's programs: on PATH, or the newest that Debian's packages made.

    Raises:
        ServiceError: there is none; the message says how to install it.
    """
    on_path = [Path(folder) for folder in os.get_exec_path()]
    packaged = sorted(DEBIAN_FOLDER.glob("*/bin"), key=lambda path: int(path.parent.name))
    for folder in [*on_path, *reversed(packaged)]:
        if all(os.access(folder / name, os.X_OK) for name in PROGRAMS):
            return folder
    raise ServiceError(
        f"PostgreSQL is not installed ({', '.join(PROGRAMS)} are not on PATH nor in "
        f"{DEBIAN_FOLDER}/*/bin): apt-get install postgresql, or brew install postgresql"
    )


def postgres_service(folder: Path, log: Path, *, port: int, password: str) -> Service:
    """The server of the database in `folder`, which is made if it is not there.

    Raises:
        ServiceError: PostgreSQL is missing, or cannot make or reach the folder.
    """
    programs = find_programs()
    user = _user()
    if not folder.exists():
        _initialise(programs, folder, user, password)
    _check_reachable(folder, user)
    ready = [str(programs / "pg_isready"), "-q", "-h", LOOPBACK, "-p", str(port), "-d", DATABASE]
    return Service(
        name="PostgreSQL",
        # No socket in the file system: a path of it may not be long.
        command=[
            *(str(programs / "postgres"), "-D", str(folder)),
            *("-h", LOOPBACK, "-p", str(port), "-k", ""),
        ],
        log=log,
        is_healthy=lambda: subprocess.run(ready, check=False).returncode == 0,
        folder=folder,
        user=user,
        # Clients are sent away; SIGTERM would wait for them.
        stop_signal=signal.SIGINT,
    )


def database_uri(port: int) -> str:
    """Address of the database; the password is PGPASSWORD's."""
    return f"postgresql+psycopg://{DATABASE_USER}@{LOOPBACK}:{port}/{DATABASE}"


def _user() -> str | None:
    """Whom the server runs as: this user, or somebody else if this is root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    for name in UNPRIVILEGED:
        if name in known:
            return name
    raise ServiceError(
        f"PostgreSQL refuses to run as root, and there is no user {' or '.join(UNPRIVILEGED)}: "
        "start the stack as another user"
    )


def _initialise(programs: Path, folder: Path, user: str | None, password: str) -> None:
    # Under another name until it is whole: what a killed start has left is made anew.
    unfinished = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True, mode=0o700)
    if user is not None:
        shutil.chown(unfinished, user)
    _check_reachable(unfinished, user)
    with tempfile.NamedTemporaryFile("w", prefix="nsa-stack-") as secret:
        secret.write(password)
        secret.flush()
        if user is not None:
            shutil.chown(secret.name, user)
        done = subprocess.run(
            [
                *(str(programs / "initdb"), "-D", str(unfinished), "-U", DATABASE_USER),
                *("-A", "scram-sha-256", f"--pwfile={secret.name}", "-E", "UTF8", "--locale=C"),
            ],
            cwd=unfinished,
            capture_output=True,
            text=True,
            check=False,
            **identity(user),
        )
    if done.returncode:
        raise ServiceError(f"initdb cannot make {folder}:\n{done.stderr.strip()}")
    unfinished.rename(folder)


def _check_reachable(folder: Path, user: str | None) -> None:
    probe = ["sh", "-c", 'test -w "$0"', str(folder)]
    if subprocess.run(probe, cwd="/", check=False, **identity(user)).returncode:
        who = f"user {user!r}, as whom PostgreSQL runs because this is root," if user else "you"
        raise ServiceError(
            f"{folder}: {who} cannot write there; name a folder that is open to it with --folder, "
            "with every folder above it"
        )
