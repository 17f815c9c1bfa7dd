"""Serve models on this machine or on a cluster until interrupted.

    python -m deployments.serve --config deployments/configs/quickstart.yaml     (make serve)
    python -m deployments.serve --config X.yaml --set http_options.port=8080

The file is Ray Serve's own: `serve run X.yaml` and `serve deploy X.yaml` take it too. With
RAY_ADDRESS in the environment that cluster is used, else one is started here. Ctrl-C stops all that
was started.

Exit status: 130 interrupted; 2 wrong configuration; 1 anything else.
"""

import argparse
import logging
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ray import serve
from ray.serve.config import ProxyLocation
from rich.console import Console
from rich.syntax import Syntax

from deployments.config_file import ServeFile
from deployments.llm import bind
from jobs.cli import EXIT_BAD_CONFIG, fail, interruptible
from jobs.cluster import connect
from nsa_platform.config.base import ConfigError

MIN_CPUS = 4
"""Ray's own actors of Serve count as CPUs on small machines: replicas must fit beside them."""


class DeployError(RuntimeError):
    """The application did not start; the message is the reason in one line."""


@contextmanager
def served(file: ServeFile) -> Iterator[str]:
    """Deploy the file's application for the block; yields its address. Needs a Ray connection.

    Raises:
        DeployError: a replica could not start.
    """
    application, http = file.applications[0], file.http_options
    # What it says of its own progress is said here already, and better.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(
            proxy_location=ProxyLocation(file.proxy_location), http_options=http.model_dump()
        )
    except RuntimeError as error:
        reason = reason_of(str(error))
        key = f"http_options.port={http.port}" if "bind" in reason else "http_options"
        raise DeployError(f"{key}: {reason}") from None
    try:
        try:
            serve.run(
                bind(file.serving_args(Path.cwd())),
                name=application.name,
                route_prefix=application.route_prefix,
            )
        except RuntimeError as error:
            raise DeployError(_reason(application.name) or str(error)) from None
        host = "127.0.0.1" if http.host == "0.0.0.0" else http.host
        yield f"http://{host}:{http.port}{application.route_prefix.rstrip('/')}"
    except DeployError:
        # What does not start may not stop in time either: the reason is worth more than that.
        with suppress(TimeoutError):
            serve.delete(application.name)
        raise
    except BaseException:
        serve.delete(application.name)
        raise
    else:
        serve.delete(application.name)


def reason_of(message: str) -> str:
    """The line of Ray Serve's account of a failure that says why; "" if it holds none."""
    reasons = re.findall(r"StartError: (.+)", message)
    last = reasons[-1] if reasons else (message.strip().splitlines() or [""])[-1]
    return re.sub(r"^([\w.]+\.)?\w*Error: ", "", last)


def _reason(name: str) -> str:
    """Why the application's first unhealthy deployment does not run."""
    application = serve.status().applications.get(name)
    for deployment in application.deployments.values() if application else ():
        if deployment.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            return reason_of(deployment.message)
    return ""


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until interrupted; ends the process with an exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="X.yaml", help="Ray Serve's file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.0.b=value",
        dest="overrides",
        help="patch one key before validation; may be given again",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and stop"
    )
    options = parser.parse_args(argv)
    try:
        file = ServeFile.read(options.config, options.overrides)
    except ConfigError as error:
        fail(str(error), status=EXIT_BAD_CONFIG)
    console = Console(highlight=False, soft_wrap=True)
    console.print(Syntax(file.to_yaml(), "yaml", background_color="default", word_wrap=True))
    if options.dry_run:
        return
    try:
        with (
            interruptible("interrupted; nothing is served any more"),
            connect(num_cpus=MIN_CPUS),
            served(file) as address,
        ):
            _announce(console, address, file)
            try:
                while True:
                    time.sleep(3600)
            except KeyboardInterrupt:
                console.print(
                    "Stopping as soon as open answers have ended; Ctrl-C again ends them."
                )
                raise
    except (DeployError, OSError) as error:
        fail(str(error))


def _announce(console: Console, address: str, file: ServeFile) -> None:
    model = file.serving_args(Path.cwd()).llm_configs[0].model_id
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    console.print(
        f"\n[bold]Serving {model}[/]\n"
        f"  OpenAI API  {address}/v1\n"
        f"  chat page   {address}/\n"
        f"  try         curl -s {address}/v1/chat/completions -H 'content-type: application/json'"
        f" -d {shlex.quote(body)}\n"
        "  stop        Ctrl-C",
        markup=True,
    )


if __name__ == "__main__":
    main()
