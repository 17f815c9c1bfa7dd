"""Measure an exported model: bits per byte against baselines, needles in a haystack, tasks.

    python -m jobs.evaluate --config jobs/configs/evaluate/smoke.yaml --dry-run
    python -m jobs.evaluate --config X.yaml --set checkpoint=models:/nsa@champion

Reads an EvaluateRun. Writes metrics, tables, figures and results.json to an MLflow run.
Exit status: 0 measured; 2 the config is wrong (nothing was started); 1 anything else.
"""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.cli import fail, interruptible, read_run
from jobs.evaluation import evaluate
from jobs.policies import warn_of_budget
from jobs.policy_tables import policy_tables
from nsa_platform.config.runs import EvaluateRun


def main(argv: Sequence[str] | None = None) -> None:
    run, dry_run = read_run(EvaluateRun, __doc__ or "", argv)
    if dry_run:
        warn_of_budget(run)
        return
    with interruptible("interrupted; the same command measures everything anew"):
        try:
            print_results(evaluate(run))
        except (ValueError, OSError) as error:
            fail(str(error))


def print_results(results: dict[str, Any]) -> None:
    """The results as small tables."""
    console = Console()
    if "bits_per_byte" in results:
        table = Table("held-out text", "bits per byte", "nats per token")
        for name, each in results["bits_per_byte"].items():
            table.add_row(name, _number(each["bits_per_byte"]), _number(each["nats_per_token"]))
        console.print(table)
    if "needle" in results:
        needle = results["needle"]
        table = Table("needle in a haystack", f"mean of {len(needle['trials'])} needles")
        table.add_row("number written exactly", f"{needle['exact']:.0%}")
        table.add_row("tokens of the number, earlier ones given", f"{needle['tokens']:.0%}")
        table.add_row("worth of the needle for log p(number)", f"{needle['lift']:+.2f} nats")
        console.print(table)
    if "baselines" in results:
        for head, rows in policy_tables(results["baselines"]):
            table = Table(*head)
            for row in rows:
                table.add_row(*row)
            console.print(table)
    if "tasks" in results:
        table = Table("task", "cell", "samples", "score", "95 % interval")
        for name, task in results["tasks"].items():
            for cell, score in task["cells"].items():
                interval = f"{score['low']:.3f} to {score['high']:.3f}"
                table.add_row(name, cell, str(score["samples"]), f"{score['mean']:.3f}", interval)
        console.print(table)
    run = f"run {results['run_id']}" if results["run_id"] else "a run that waits to be delivered"
    console.print(f"MLflow {run} in {results['tracking_uri']}", soft_wrap=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
