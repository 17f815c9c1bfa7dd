"""report.md of a run: what, where, how long, what it cost, and what came out of it."""

import platform
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch

from jobs.policy_tables import policy_tables
from jobs.training_inputs import Inputs, Origin
from nsa_platform.config.data import Sources
from nsa_platform.config.runs import EvaluateRun, PretrainRun, SftRun
from nsa_platform.model.cost import count_parameters

REPORT = "report.md"


def training_report(
    run: PretrainRun | SftRun,
    origin: Origin,
    inputs: Inputs,
    result: Mapping[str, Any],
    *,
    seconds: float,
) -> str:
    """Markdown for people.

    Args:
        result: what the run has come to, as it is kept in finished.json.
        seconds: that the workers had, from asking for them to their end, in this attempt.
    """
    parameters, workers = count_parameters(origin.model), run.cluster.num_workers
    step, stages = result["step"], run.in_stages()
    rows_of = [f"{stage.data.context_length:,}" for stage in stages]
    digests = [described["data_digest"][:12] for described in inputs.described]
    shards = {
        f"{_folders(stage.data)}, digest {digest}": None
        for stage, digest in zip(stages, digests, strict=True)
    }
    active = "" if parameters.active == parameters.total else f", {parameters.active:,} active"
    least = f"{run.cluster.min_workers} to " if run.cluster.min_workers else ""
    adapted = "" if run.train.lora is None else f", adapters of rank {run.train.lora.rank} trained"
    attempt = ""
    if inputs.facts is not None:
        attempt = f", since step {inputs.facts['step']}, where this attempt began"
    what = {
        "model": f"{origin.model.name}, {origin.model.attention.kind} attention",
        "parameters": f"{parameters.total:,}{active}{adapted}",
        "began as": origin.start_from or "random weights",
        "data": "; ".join(shards),
        "trained on": f"{step * run.train.tokens_per_step:,} tokens in {step:,} steps, "
        f"rows of {', then '.join(rows_of)}",
        "where": f"{least}{workers} x {result['device']}, driven from {socket.gethostname()}",
        "with": _versions(),
        "time": f"{_duration(seconds)}{attempt}",
        "cost": _cost(seconds * workers / 3600, run.cluster.price_per_worker_hour) + attempt,
        "left": result["model"] + (f", {result['registered']}" if result["registered"] else ""),
    }
    return "\n".join(
        [
            f"# {run.name}\n",
            *markdown_table(("", ""), list(what.items())),
            "",
            *markdown_table(("", "first step", "end"), _outcome(result)),
            "\nCurves and pictures: `figures/`. Configuration: `config.yaml`.\n",
        ]
    )


def _outcome(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What was measured at the first step and at the end."""
    metrics = result["metrics"]
    outcome = [
        ("training loss, nats per token", result["first_loss"], result["last_loss"]),
        ("held-out loss, nats per token", None, metrics.get("valid/loss")),
        ("held-out bits per byte", None, metrics.get("valid/bits_per_byte")),
        ("needles written exactly", None, metrics.get("valid/needle_exact")),
        ("tokens per second", None, metrics.get("train/tokens_per_s")),
        ("model FLOPs utilization", None, metrics.get("train/mfu")),
    ]
    return [
        (name, _number(first), _number(last)) for name, first, last in outcome if last is not None
    ]


def _folders(data: Sources) -> str:
    """The folders that rows come from, with their shares if there are several."""
    if not data.mixture:
        return data.path
    sources = [(data.path, data.weight), *((each.path, each.weight) for each in data.mixture)]
    total = sum(weight for _, weight in sources)
    return " and ".join(f"{weight / total:.0%} {path}" for path, weight in sources)


def evaluation_report(run: EvaluateRun, results: Mapping[str, Any], *, seconds: float) -> str:
    """Markdown for people; `results` as jobs.evaluation.evaluate returns them."""
    what = {
        "model": run.checkpoint,
        "held-out text": run.data,
        "where": f"{results['device']}, driven from {socket.gethostname()}",
        "with": _versions(),
        "time": _duration(seconds),
    }
    lines = [f"# {run.name}\n", *markdown_table(("", ""), list(what.items()))]
    if "bits_per_byte" in results:
        rows = [
            (name, _number(each["bits_per_byte"]), _number(each["nats_per_token"]))
            for name, each in results["bits_per_byte"].items()
        ]
        lines += ["", *markdown_table(("held-out text", "bits per byte", "nats per token"), rows)]
    if "needle" in results:
        needle = results["needle"]
        rows = [
            ("number written exactly", f"{needle['exact']:.0%}"),
            ("tokens of the number, earlier ones given", f"{needle['tokens']:.0%}"),
            ("worth of the needle for log p(number)", f"{needle['lift']:+.2f} nats"),
        ]
        lines += [
            "",
            *markdown_table(("needle in a haystack", f"{len(needle['trials'])} needles"), rows),
        ]
    if "baselines" in results:
        for head, rows in policy_tables(results["baselines"]):
            lines += ["", *markdown_table(head, rows)]
    if "tasks" in results:
        rows = [
            (name, cell, f"{score['samples']}", f"{score['mean']:.3f}",
             f"{score['low']:.3f} to {score['high']:.3f}")
            for name, task in results["tasks"].items()
            for cell, score in task["cells"].items()
        ]  # fmt: skip
        lines += ["", *markdown_table(("task", "cell", "samples", "score", "95 % interval"), rows)]
    return "\n".join([*lines, "\nTables and pictures: `evaluation/`.\n"])


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _versions() -> str:
    return f"Python {platform.python_version()}, torch {torch.__version__}, ray {ray.__version__}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min {rest} s" if hours else f"{minutes} min {rest} s"


def _cost(worker_hours: float, price: float | None) -> str:
    if price is None:
        return f"{worker_hours:.3f} worker hours"
    return f"{worker_hours:.3f} worker hours, {worker_hours * price:.2f} at {price:g} each"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.3f}"
