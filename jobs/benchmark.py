"""Measure a server of OpenAI's API: tokens per second, time to the first token, time per token.

    python -m jobs.benchmark --input-len 32000 --output-len 128 --num-prompts 16 --max-concurrency 4

Prompts are windows of real text (this Python's standard library unless --dataset-path names other
files), as token ids of exactly --input-len, for which the server must have /tokenize as this
platform's and vLLM's have; answers have exactly --output-len tokens (ignore_eos).
With --dataset-name prefix_repetition several prompts share each of a few beginnings, as turns of a
conversation do. With --tracking-uri the load becomes an MLflow run. Flags of the load, and names in
the file of --result-filename, are those of `vllm bench serve`, which works against these servers
too. A server that asks for a key gets that of OPENAI_API_KEY.

Exit status: 0 all requests were answered; 1 some were not; 2 the server or a flag is wrong.
"""

import argparse
import asyncio
import json
import sysconfig
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import Progress

from jobs.cli import EXIT_BAD_CONFIG, FlagParser, fail, interruptible
from jobs.load_record import record_load
from jobs.serving_load import (
    LoadError,
    Sample,
    draw_prompts,
    draw_turns,
    run_load,
    served_model,
    summary,
    tokens_of,
)
from nsa_platform.config.base import ConfigError
from nsa_platform.config.locations import resolve_locations
from nsa_platform.config.train import TrackingConfig

# Without a terminal, a line at most this often.
LINE_EVERY_S = 5.0

SIZES = {
    "random": {"input_len": 1024},
    "prefix_repetition": {
        "prefix_repetition_prefix_len": 512,
        "prefix_repetition_suffix_len": 128,
        "prefix_repetition_num_prefixes": 4,
    },
}
"""Flags of each kind of load, and what they are if they are not given."""
MEANINGS = {
    "input_len": "tokens of a prompt",
    "prefix_repetition_prefix_len": "shared tokens",
    "prefix_repetition_suffix_len": "own tokens",
    "prefix_repetition_num_prefixes": "beginnings",
}

LINES = {
    "Successful requests": "completed",
    "Failed requests": "failed",
    "Benchmark duration (s)": "duration",
    "Total input tokens": "total_input_tokens",
    "Total generated tokens": "total_output_tokens",
    "Prompt tokens from the cache": "total_cached_tokens",
    "Request throughput (req/s)": "request_throughput",
    "Request goodput (req/s)": "request_goodput",
    "Output token throughput (tok/s)": "output_throughput",
    "Total token throughput (tok/s)": "total_token_throughput",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Send the load, print and record what it took."""
    options = _options(argv)
    tracking = _tracking(options)
    console = Console(highlight=False, soft_wrap=True)
    with interruptible("interrupted; nothing was recorded"):
        try:
            _check_place(options.result_filename)
            result, samples = _measure(options, console)
        except (LoadError, OSError) as error:
            fail(str(error), status=EXIT_BAD_CONFIG)
    _report(result, console)
    for sample in samples:
        if sample.error:
            console.print(f"failed: {sample.error}", markup=False)
    if options.result_filename is not None:
        try:
            text = json.dumps(result, indent=1) + "\n"
            options.result_filename.write_text(text, encoding="utf-8")
        except OSError as error:
            fail(f"--result-filename: {error}")
        console.print(f"{options.result_filename}", markup=False)
    if tracking is not None:
        run_id = record_load(
            tracking,
            base_url=options.base_url,
            settings={key: str(value) for key, value in vars(options).items()},
            result=result,
            samples=samples,
        )
        where = f"run {run_id}" if run_id else "a run that waits to be delivered"
        console.print(f"MLflow {where} in {tracking.uri}", markup=False)
    return 1 if result["failed"] else 0


def _tracking(options: argparse.Namespace) -> TrackingConfig | None:
    """Where the load is recorded; a wrong flag ends the process."""
    if options.tracking_uri is None:
        return None
    tree = {
        "uri": options.tracking_uri,
        "experiment": options.experiment,
        "parent": options.parent,
    }
    try:
        tracking = TrackingConfig.parse(tree, source="--tracking-uri, --experiment, --parent")
    except ConfigError as error:
        fail(str(error), status=EXIT_BAD_CONFIG)
    return resolve_locations(tracking, Path.cwd())


def _check_place(path: Path | None) -> None:
    """Before anything is measured: the record will have a place."""
    if path is None:
        return
    if path.is_dir():
        raise LoadError(f"--result-filename: {path} is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)


def _measure(options: argparse.Namespace, console: Console) -> tuple[dict[str, Any], list[Sample]]:
    model, max_model_len = served_model(options.base_url, options.model)
    input_len = _input_len(options)
    total = input_len + options.output_len
    if max_model_len and total > max_model_len:
        lengths = [name for name in SIZES[options.dataset_name] if name.endswith("_len")]
        flags = " + ".join(_flag(name) for name in [*lengths, "output_len"])
        raise LoadError(f"{flags} = {total} exceed the model's max_model_len={max_model_len}")
    console.print(f"reading text for {model}", markup=False)
    ids = tokens_of(
        options.base_url,
        model,
        _texts(options.dataset_path),
        count=2 * input_len,
        max_model_len=max_model_len or total,
    )
    warm, count = options.num_warmups, options.num_prompts
    prompts = _prompts(options, ids, warm + count)
    load = {
        "output_len": options.output_len,
        "burstiness": options.burstiness,
        "seed": options.seed,
    }
    concurrency = options.max_concurrency or count
    inf = float("inf")
    with _Answers(warm + count, console) as answers:
        asyncio.run(
            run_load(
                options.base_url, model, prompts[:warm], max_concurrency=concurrency,
                request_rate=inf, on_done=answers.add, **load,
            )
        )  # fmt: skip
        samples, duration = asyncio.run(
            run_load(
                options.base_url, model, prompts[warm:], max_concurrency=concurrency,
                request_rate=options.request_rate, on_done=answers.add, **load,
            )
        )  # fmt: skip
    result = {
        **dict(options.metadata),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "backend": "openai",
        "model_id": model,
        "num_prompts": count,
        "dataset_name": options.dataset_name,
        "input_len": input_len,
        **{name: getattr(options, name) for name in SIZES[options.dataset_name]},
        "output_len": options.output_len,
        "request_rate": "inf" if options.request_rate == inf else options.request_rate,
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        **summary(samples, duration, dict(options.goodput)),
    }
    return result, samples


def _input_len(options: argparse.Namespace) -> int:
    """Tokens of a prompt."""
    if options.dataset_name == "random":
        return options.input_len
    return options.prefix_repetition_prefix_len + options.prefix_repetition_suffix_len


def _prompts(options: argparse.Namespace, ids: Sequence[int], count: int) -> list[list[int]]:
    if options.dataset_name == "random":
        return draw_prompts(ids, length=options.input_len, count=count, seed=options.seed)
    return draw_turns(
        ids,
        num_prefixes=options.prefix_repetition_num_prefixes,
        prefix_len=options.prefix_repetition_prefix_len,
        suffix_len=options.prefix_repetition_suffix_len,
        count=count,
        seed=options.seed,
    )


class _Answers:
    """How many answers have come: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int, console: Console) -> None:
        self._total, self._console = total, console
        self._bar = Progress(console=console, disable=not console.is_terminal)
        self._done, self._told_s = 0, time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        self._task = self._bar.add_task("answers", total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def add(self, sample: Sample) -> None:
        """Count one answer."""
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        if self._bar.disable and time.monotonic() - self._told_s >= LINE_EVERY_S:
            self._told_s = time.monotonic()
            self._console.print(f"{self._done} of {self._total} answers", markup=False)


def _texts(path: Path | None) -> list[Path]:
    """Files in the order of their names."""
    path = path or Path(sysconfig.get_path("stdlib"))
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise LoadError(f"--dataset-path: {path} is neither a file nor a folder")
    found = sorted(each for each in path.glob("*") if each.is_file())
    if not found:
        raise LoadError(f"--dataset-path: {path} holds no file")
    return found


def _report(result: dict[str, Any], console: Console) -> None:
    for label, key in LINES.items():
        if result[key] is not None:
            console.print(f"{label + ':':40}{result[key]:>12,}")
    for name, meaning in (
        ("ttft", "Time to first token"),
        ("tpot", "Time per output token"),
        ("itl", "Inter-token latency"),
        ("e2el", "End-to-end latency"),
    ):
        if f"mean_{name}_ms" in result:
            values = (result[f"{kind}_{name}_ms"] for kind in ("mean", "median", "p99"))
            numbers = " / ".join(f"{value:,.2f}" for value in values)
            console.print(f"{meaning + ', mean/median/p99 (ms):':48}{numbers}")


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000", help="the server, without /v1")
    add("--model", help="served model; needed only where several are served")
    add("--dataset-path", type=Path, metavar="PATH", help="text file, or folder of text files")
    add(
        "--dataset-name",
        choices=("random", "prefix_repetition"),
        default="random",
        help="windows of text, or beginnings that several prompts share (%(default)s)",
    )
    for name, size in {**SIZES["prefix_repetition"], **SIZES["random"]}.items():
        add(_flag(name), type=_positive, help=f"{MEANINGS[name]} ({size})")
    add("--output-len", type=_positive, default=128, help="tokens of an answer (%(default)s)")
    add("--num-prompts", type=_positive, default=16, help="requests (%(default)s)")
    add("--max-concurrency", type=_positive, help="requests open at once (all)")
    add("--request-rate", type=_rate, default=float("inf"), help="requests a second (inf)")
    add("--burstiness", type=_rate, default=1.0, help="1: Poisson; below: in clumps (%(default)s)")
    add(
        "--goodput", type=_goal, nargs="+", default=[], metavar="NAME:MS",
        help="count answers that keep all of these: ttft, tpot, e2el in milliseconds",
    )  # fmt: skip
    add("--num-warmups", type=_natural, default=1, help="requests before the clock (%(default)s)")
    add("--seed", type=int, default=0, help="of the windows and the arrivals (%(default)s)")
    add("--metadata", type=_pair, action="append", default=[], metavar="K=V", help="for the record")
    add("--tracking-uri", metavar="URI", help="record it in this MLflow store (nowhere)")
    add("--experiment", default="nsa", help="of that store (%(default)s)")
    add("--parent", metavar="NAME", help="the run below which it stands there (none)")
    add("--result-filename", type=Path, metavar="X.json", help="write the record there")
    return parser


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; those that the load would not heed are refused."""
    parser = _parser()
    options = parser.parse_args(argv)
    for dataset, sizes in SIZES.items():
        for name, size in sizes.items():
            if getattr(options, name) is None:
                setattr(options, name, size)
            elif options.dataset_name != dataset:
                parser.error(f"{_flag(name)} is of no use to --dataset-name={options.dataset_name}")
    if options.parent is not None and options.tracking_uri is None:
        parser.error("--parent is of no use without --tracking-uri")
    if not options.base_url.startswith(("http://", "https://")):
        parser.error(f"--base-url must begin with http:// or https://, got {options.base_url!r}")
    return options


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not rate > 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0 or inf, got {text!r}")
    return rate


def _goal(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    try:
        goal = float(limit)
    except ValueError:
        goal = 0.0
    if name not in ("ttft", "tpot", "e2el") or not goal > 0:
        raise argparse.ArgumentTypeError(
            f"must be ttft:MS, tpot:MS or e2el:MS with MS above 0, got {text!r}"
        )
    return name, goal


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, got {text!r}")
    return key, value


if __name__ == "__main__":
    raise SystemExit(main())
