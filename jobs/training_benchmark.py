"""Measure training: tokens per second, MFU and memory of a model by context, on random tokens.

    python -m jobs.training_benchmark --config jobs/configs/pretrain/nsa_1b.yaml --json X.json
    torchrun --nproc-per-node 2 -m jobs.training_benchmark --config X.yaml --json X.json \
        --contexts 131072 --attention nsa full_sdpa --set train.mesh.context_parallel_degree=2

Takes a PretrainRun and trains its model as that run would (compiled, recomputed, sharded as it
says) without Ray, MLflow or data. `full` is the same shape with full attention by this platform's
kernel, `full_sdpa` by torch's: cuDNN's on a GPU. Of --recompute each mode is tried in turn until
one fits; a mode that did not fit is not tried at longer contexts. Blocks that a model selects
before it has learned anything are as good as random, the hardest case.

Where memory runs out, the point says so and the others follow. The JSON is written after each
point, by the first worker; jobs.training_report makes the page and the picture from it.
Exit status: 0 measured; 2 the config is wrong; 1 a point failed for another reason than memory.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jobs.cli import EXIT_BAD_CONFIG, fail, interruptible, parser
from jobs.training_points import ATTENTIONS, Point, attention_kernel, run_of
from jobs.training_record import about, record_of, write_record
from jobs.worker_group import worker_group
from nsa_platform.config.base import ConfigError
from nsa_platform.config.runs import PretrainRun
from nsa_platform.train.estimate import estimate
from nsa_platform.train.parallel import World
from nsa_platform.train.trial import Subject, Tried

CONTEXTS = (8192, 32768, 65536, 131072)
OUT_OF_MEMORY = "out of memory"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    result = parser(PretrainRun, __doc__ or "")
    result.add_argument("--json", type=Path, required=True, help="the record to write")
    result.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, metavar="TOKENS")
    result.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=("nsa", "full_sdpa"))
    result.add_argument(
        "--recompute", nargs="+", default=("selective", "full"), metavar="MODE",
        help="train.activation_checkpointing; several that layers take in turn: full,branches",
    )  # fmt: skip
    result.add_argument("--warm-up", type=int, default=1, metavar="STEPS", help="not measured")
    result.add_argument("--steps", type=int, default=3, help="measured; their median counts")
    result.add_argument(
        "--step-tokens", type=int, metavar="TOKENS",
        help="of one step, for each worker that has rows of its own; default: the longest context",
    )  # fmt: skip
    result.add_argument(
        "--microbatch-tokens", type=int, default=32768, metavar="TOKENS",
        help="rows that go through the model at once have so many together, one row at least",
    )  # fmt: skip
    result.add_argument("--commit", help="of the code, where git cannot tell")
    return result.parse_args(argv)


def points(options: argparse.Namespace) -> Iterator[Point]:
    """What is measured, in order: kind by kind, from the shortest context to the longest."""
    contexts = sorted(set(options.contexts))
    for attention in options.attention:
        for context in contexts:
            yield Point(
                attention,
                context,
                step_tokens=max(context, options.step_tokens or contexts[-1]),
                microbatch_tokens=options.microbatch_tokens,
            )


class Measurement:
    """Points one after the other, on this worker; a model is kept while it can be."""

    def __init__(self, run: PretrainRun, options: argparse.Namespace, world: World) -> None:
        self._run, self._world = run, world
        self._steps = {"warm_up": options.warm_up, "steps": options.steps}
        self._modes = {kind: list(options.recompute) for kind in options.attention}
        self._subject: Subject | None = None
        self._built: tuple[str, str] | None = None

    def measured(self, point: Point) -> dict[str, Any]:
        """The record of a point; one with a `failure` if it has none."""
        failure = f"{OUT_OF_MEMORY} at a shorter context"
        for mode in list(self._modes[point.attention]):
            tried = self._try(point, mode)
            if isinstance(tried, Tried):
                return record_of(point, mode, tried)
            failure = tried
            self._forget()
            if failure != OUT_OF_MEMORY:
                return record_of(point, mode, None, failure=failure)
            self._modes[point.attention].remove(mode)
        return record_of(point, None, None, failure=failure)

    def _try(self, point: Point, mode: str) -> Tried | str:
        """What was found, or why nothing: the same on all workers, for they go on together."""
        tried: Tried | None = None
        failure: str | None = None
        try:
            tried = self._tried(point, mode)
        except torch.OutOfMemoryError:
            failure = OUT_OF_MEMORY
        # A kernel that cannot run here must not end what others can.
        except RuntimeError as error:
            failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        failures: list[str | None] = [None] * self._world.size
        dist.all_gather_object(failures, failure)
        failure = next((each for each in failures if each is not None), None)
        if failure is not None:
            return failure
        assert tried is not None
        return tried

    def _tried(self, point: Point, mode: str) -> Tried:
        run = run_of(self._run, point, mode, workers=self._world.size)
        (stage,) = run.in_stages()
        assert run.model is not None
        with attention_kernel(point.attention):
            if self._subject is None or self._built != (point.attention, mode):
                self._forget()
                self._subject = Subject(run.model, stage, self._world)
                self._built = point.attention, mode
            return self._subject.tried(stage, **self._steps)

    def _forget(self) -> None:
        self._subject = self._built = None


@interruptible("interrupted; the same command begins anew")
def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    try:
        with worker_group() as world:
            run = _load(options, world)
            for line in _plan(run, options, world):
                if options.dry_run and world.is_first:
                    print(line)
            if not options.dry_run:
                _measure(run, options, world)
    except ConfigError as error:
        fail(str(error), status=EXIT_BAD_CONFIG)


def _load(options: argparse.Namespace, world: World) -> PretrainRun:
    """The configuration for these workers; rows and steps are the points'."""
    shortest, longest = min(options.contexts), max(options.contexts)
    ours = {
        "cluster.num_workers": world.size,
        "cluster.min_workers": "null",
        "model.max_context": longest,
        "data.context_length": shortest,
        "train.sequences_per_microbatch": 1,
        "train.tokens_per_step": shortest * world.size,
    }
    patches = [f"{key}={value}" for key, value in ours.items()]
    return PretrainRun.load(options.config, [*options.overrides, *patches])


def _plan(run: PretrainRun, options: argparse.Namespace, world: World) -> list[str]:
    """What each point takes, by estimate.

    Raises:
        ConfigError: a point cannot be trained.
    """
    lines = []
    for point in points(options):
        for mode in options.recompute:
            tried = run_of(run, point, mode, workers=world.size)
            assert tried.model is not None
            plan = estimate(tried.model, tried.data, tried.train, tried.cluster)
            rows = f"{plan.microbatches} x {tried.train.sequences_per_microbatch} rows"
            lines.append(
                f"{_where(point.attention, point.context, mode)}{rows:>12}  about "
                f"{plan.state_bytes / 2**30:.1f} GiB state, "
                f"{plan.activation_bytes / 2**30:.1f} GiB activations"
            )
    return lines


def _measure(run: PretrainRun, options: argparse.Namespace, world: World) -> None:
    measurement, records = Measurement(run, options, world), []
    command = " ".join(sys.argv[1:]) if sys.argv else ""
    tree = about(run, world, options.json.stem, command=command, commit=options.commit)
    for point in points(options):
        records.append(measurement.measured(point))
        if world.is_first:
            print(_line(records[-1]), flush=True)
            write_record({**tree, "records": records}, options.json)
    failures = [record["failure"] for record in records if "failure" in record]
    broken = [failure for failure in failures if not failure.startswith(OUT_OF_MEMORY)]
    if broken:
        fail(f"{len(broken)} of {len(records)} points failed: {broken[0]}")


def _line(record: dict[str, Any]) -> str:
    where = _where(record["attention"], record["context"], record["recompute"] or "")
    if "failure" in record:
        return f"{where}{record['failure']}"
    mfu = "".join(f"  {name} {record[name]:.1%}" for name in ("mfu", "mfu_dense") if name in record)
    return (
        f"{where}{record['step_s']:8.3f} s  {record['value']:10,.0f} tokens/s/GPU{mfu}"
        f"  {record.get('memory_gib', 0.0):.1f} GiB"
    )


def _where(attention: str, context: int, recompute: str) -> str:
    return f"{attention:<10}{context:>9,}  {recompute:<10}"


if __name__ == "__main__":
    main()
