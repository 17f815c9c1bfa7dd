"""Stack: a whole cluster on this machine: Ray, and MLflow on PostgreSQL and S3.

    python -m jobs.stack                        (make stack)
    python -m jobs.stack --folder DIR --mlflow-port 0

Everything listens on loopback alone. Data and logs lie below DIR, and are used again by the next
start. Prints what to export, and writes it to DIR/environment.sh: then `python -m jobs.submit`
sends jobs to this Ray, `--set tracking.uri=$MLFLOW_TRACKING_URI` records them here, and
`s3://nsa/...` is a place for data, checkpoints and models. Ctrl-C or SIGTERM stops everything.

Exit status: 0 stopped; 2 something is missing or taken (nothing was started); 1 a service did not
start or has ended.
"""

import argparse
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from jobs.cli import EXIT_BAD_CONFIG, fail, interruptible, port_number
from jobs.local_stack import BUCKET, ENVIRONMENT_FILE, LocalStack, Ports
from jobs.ports import free_ports, is_free
from jobs.services import ServiceError

CHECK_EVERY_S = 0.5


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stack until it is interrupted."""
    options = _arguments(argv)
    folder = Path(options.folder).resolve()
    console = Console(highlight=False, soft_wrap=True)
    try:
        stack = LocalStack(folder, _ports(options), num_cpus=options.num_cpus)
    except (ServiceError, OSError) as error:
        fail(str(error), status=EXIT_BAD_CONFIG)
    problem = None
    with interruptible():
        try:
            stack.start(lambda name: console.print(f"{name} answers"))
            _print_how_to_use(stack, console)
            while True:
                time.sleep(CHECK_EVERY_S)
                stack.check()
        except KeyboardInterrupt:
            console.print("stopping")
        except (ServiceError, OSError) as error:
            problem = str(error)
        finally:
            # Whoever asks twice would leave processes behind.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            stack.stop()
    if problem is not None:
        fail(problem)
    console.print(f"stopped; the data are in {folder}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="runs/stack", metavar="DIR", help="default runs/stack")
    for name, default in (("dashboard", 8265), ("mlflow", 5000), ("s3", 8333)):
        parser.add_argument(
            f"--{name}-port",
            type=port_number,
            default=default,
            metavar="PORT",
            help=f"default {default}; 0: any that is free",
        )
    parser.add_argument("--num-cpus", type=int, help="that Ray gives away; default: the machine's")
    return parser.parse_args(argv)


def _ports(options: argparse.Namespace) -> Ports:
    """The ports that were asked for. Raises ServiceError if one is taken."""
    free = free_ports(3, but=(options.dashboard_port, options.mlflow_port, options.s3_port))
    chosen: dict[str, int] = {}
    for name in ("dashboard", "mlflow", "s3"):
        port = getattr(options, f"{name}_port") or free.pop()
        if not is_free(port):
            raise ServiceError(
                f"--{name}-port: port {port} is taken; name another one, or 0 for any that is free"
            )
        chosen[name] = port
    return Ports(**chosen)


def _print_how_to_use(stack: LocalStack, console: Console) -> None:
    environment = stack.environment
    console.print(f"\n{'Ray':8}{environment['RAY_API_SERVER_ADDRESS']}")
    console.print(f"{'MLflow':8}{environment['MLFLOW_TRACKING_URI']}")
    console.print(f"{'S3':8}{environment['AWS_ENDPOINT_URL']} (s3://{BUCKET})\n")
    console.print("\n".join(stack.export_lines()), markup=False)
    console.print(f"\nIn another shell:  source {stack.folder / ENVIRONMENT_FILE}\nCtrl-C stops it")


if __name__ == "__main__":
    main()
