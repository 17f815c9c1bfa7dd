"""A real MLflow server that tests kill and start again."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from jobs.ports import free_ports
from nsa_platform.config.train import TrackingConfig
from nsa_platform.tracking import ui_command, ui_environment
from tests.waiting import eventually


class Server:
    """A real `mlflow server` on loopback that can be killed and started again."""

    def __init__(self, folder: Path, database: Path) -> None:
        """Not started yet. Its store is a copy of one that has its tables."""
        (self.port,) = free_ports(1)
        self.config = TrackingConfig(uri=f"http://127.0.0.1:{self.port}", experiment="served")
        shutil.copy(database, folder / "mlflow.db")
        self._store = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db")
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ui_command(self._store, port=self.port),
                env=ui_environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        eventually(self._answers, "the server answers")

    def kill(self) -> None:
        """kill -9 of the server and its worker, a process group of its own."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        assert self._process is not None and self._process.poll() is None, self._log.read_text()
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection,
        ):
            connection.settimeout(2)
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            return b" 200 " in connection.recv(100)
        return False
