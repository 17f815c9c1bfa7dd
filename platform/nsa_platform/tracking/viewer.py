"""How to open MLflow's pages on a tracking store."""

import os
import sys

from nsa_platform.config.train import TrackingConfig
from nsa_platform.tracking.handle import absolute_uri, artifact_root


def ui_command(config: TrackingConfig, *, host: str = "127.0.0.1", port: int = 5000) -> list[str]:
    """The command that serves the pages of a database store, artifacts included, on host:port.

    Run it with `ui_environment()`. It needs no network.

    Raises:
        ValueError: the store is a server, which has its own pages.
    """
    uri = absolute_uri(config.uri)
    if uri.startswith("http"):
        raise ValueError(f"{uri} is a server: open it in a browser")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    root = artifact_root(uri, config.artifacts)
    if root is not None:
        command += ["--artifacts-destination", root]
    return [*command, "--workers", "1", "--host", host, "--port", str(port)]


def ui_environment() -> dict[str, str]:
    """Environment for `ui_command`: no job runner's extra processes, no telemetry."""
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return {**os.environ, **quiet}
