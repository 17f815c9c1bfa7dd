"""Ray Serve's configuration files, read and checked before anything starts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt

from deployments.config import LLMServingArgs, read_args
from nsa_platform.config.base import ConfigError, Strict

IMPORT_PATH = "deployments.llm:build_openai_app"


class HttpSettings(Strict):
    """Where the proxies listen."""

    host: str = "127.0.0.1"
    """0.0.0.0: every interface."""
    port: int = Field(default=8000, ge=1, le=65535)
    """TCP port."""
    request_timeout_s: PositiveFloat | None = None
    """Seconds after which a request is given up; null: never."""
    keep_alive_timeout_s: PositiveInt = 5
    """Seconds that an idle connection is kept."""


class ServeApplication(Strict):
    """One application of the file."""

    name: str = "llm"
    """Its name in `serve status`."""
    route_prefix: str = "/"
    """Below which path it answers."""
    import_path: str = IMPORT_PATH
    """The only builder there is."""
    args: dict[str, Any]
    """Arguments of build_openai_app."""
    runtime_env: dict[str, Any] | None = None
    """Ray's runtime environment; for `serve deploy` to a cluster."""
    logging_config: dict[str, Any] | None = None
    """Ray Serve's log settings of the application."""


class ServeFile(Strict):
    """A file as `serve run` and `serve deploy` take it."""

    proxy_location: Literal["EveryNode", "HeadOnly", "Disabled"] = "EveryNode"
    """On which nodes a proxy listens."""
    http_options: HttpSettings = HttpSettings()
    """Where the proxies listen."""
    logging_config: dict[str, Any] | None = None
    """Ray Serve's log settings."""
    applications: tuple[ServeApplication, ...] = Field(min_length=1, max_length=1)
    """Exactly one."""

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a file, patch it with `a.0.b=value` overrides, validate it with all its arguments.

        Raises:
            ConfigError: one line for each problem.
        """
        parsed = cls.load(path, overrides)
        application = parsed.applications[0]
        if application.import_path != IMPORT_PATH:
            raise ConfigError(
                f"{path}: applications.0.import_path: must be {IMPORT_PATH}, got "
                f"{application.import_path!r}"
            )
        parsed.serving_args(Path.cwd())
        return parsed

    def serving_args(self, root: Path) -> LLMServingArgs:
        """Arguments of the application, relative places seen from `root`. Raises ConfigError."""
        return read_args(self.applications[0].args, root=root)
