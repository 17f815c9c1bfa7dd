"""Open MLflow's pages on a local store: curves, figures, datasets, registered models.

    python -m jobs.experiments                             (make mlflow)
    python -m jobs.experiments --uri sqlite:///DIR/mlflow.db --port 5001

Serves until Ctrl-C, on this machine alone. A tracking server has pages of its own.

Exit status: 2 the store is none that can be shown; otherwise the server's.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import EXIT_BAD_CONFIG, fail, port_number
from nsa_platform.config.base import ConfigError
from nsa_platform.config.locations import SQLITE, resolve_locations
from nsa_platform.config.train import TrackingConfig
from nsa_platform.tracking import ui_command, ui_environment


def main(argv: Sequence[str] | None = None) -> None:
    """Become the server of the pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = str(TrackingConfig().uri)
    parser.add_argument("--uri", default=default, help=f"the store; default {default}")
    parser.add_argument("--port", type=port_number, default=5000, help="default 5000")
    options = parser.parse_args(argv)
    try:
        config = resolve_locations(TrackingConfig.parse({"uri": options.uri}), Path.cwd())
        command = ui_command(config, port=options.port)
    except (ConfigError, ValueError) as error:
        fail(str(error), status=EXIT_BAD_CONFIG)
    if config.uri.startswith(SQLITE) and not Path(config.uri.removeprefix(SQLITE)).is_file():
        fail(f"{config.uri}: there is no store yet; a run makes it", status=EXIT_BAD_CONFIG)
    print(f"MLflow on {config.uri}: http://127.0.0.1:{options.port} (Ctrl-C ends it)", flush=True)
    os.execvpe(command[0], command, ui_environment())


if __name__ == "__main__":
    main()
