"""Preparation on Ray: parts and shards as tasks, with a progress bar and a report."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

import ray
from ray.exceptions import RayTaskError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from jobs.cluster import connect
from jobs.preparation_record import record_preparation
from nsa_platform.config.runs import PrepareDataRun
from nsa_platform.data.plan import Plan, Prepared, Progress
from nsa_platform.data.preparation import default_cache_dir, prepare

Job = TypeVar("Job")
Result = TypeVar("Result")

LINE_INTERVAL_S = 5.0

# One task uses one CPU; without this its tokenizer would start a thread for each of the machine's.
TASK_ENVIRONMENT = {"RAYON_NUM_THREADS": "1"}


def run_preparation(run: PrepareDataRun) -> Prepared:
    """Prepare a corpus on Ray and show how it goes; at once if it has been prepared before.

    Raises:
        CorpusError, TokenizerError, StorageError: as nsa_platform.data.preparation.prepare.
    """
    return run_plan(Plan(run, default_cache_dir()))


def run_plan(plan: Plan) -> Prepared:
    """Do what a plan says on Ray and record it; nothing happens if nothing is to be done."""
    done = plan.finished()
    if done is not None:
        return done
    began = time.monotonic()
    with connect(), ProgressDisplay() as display:
        tasks = plan.run.num_tasks or max(int(ray.cluster_resources().get("CPU", 1)), 1)
        made = prepare(plan, each=TaskPool(tasks), report=display.show)
    if plan.run.tracking is not None:
        seconds = time.monotonic() - began
        record_preparation(plan.run, plan.run.tracking, made, seconds=seconds)
    return made


class TaskPool:
    """Runs a function on jobs as Ray tasks, at most `limit` of them at once.

    A task whose worker dies is run again by Ray. If one raises, the others are cancelled.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def __call__(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], /
    ) -> Iterator[Result]:
        """Results in the order in which tasks finish."""
        task = ray.remote(function).options(
            num_cpus=1, runtime_env={"env_vars": TASK_ENVIRONMENT}, name=function.__name__
        )
        waiting = list(reversed(jobs))
        running: list[ray.ObjectRef] = []
        try:
            while waiting or running:
                while waiting and len(running) < self._limit:
                    running.append(task.remote(waiting.pop()))
                (finished, *_), running = ray.wait(running, num_returns=1)
                yield ray.get(finished)
        except RayTaskError as error:
            raise error.cause from None
        finally:
            for reference in running:
                ray.cancel(reference)


class ProgressDisplay:
    """A bar for each stage on a terminal, else a line now and then."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr)
        self._bars: Bars | None = None
        self._tasks: dict[str, tuple[TaskID, float, int]] = {}
        """Stage: bar, when it began, tokens that it began with."""
        self._next_line = 0.0

    def __enter__(self) -> "ProgressDisplay":
        if self._console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}  {task.fields[note]}"),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def show(self, progress: Progress) -> None:
        """Take in how far a stage is."""
        now = time.monotonic()
        if progress.stage not in self._tasks:
            bar = TaskID(-1)
            if self._bars is not None:
                bar = self._bars.add_task(progress.stage, total=progress.total, unit="", note="")
            self._tasks[progress.stage] = (bar, now, progress.tokens)
            self._next_line = now
        bar, began, first_tokens = self._tasks[progress.stage]
        note = _note(progress, first_tokens, now - began)
        if self._bars is not None:
            self._bars.update(bar, completed=progress.done, unit=progress.unit, note=note)
        elif now >= self._next_line or progress.done >= progress.total:
            self._next_line = now + LINE_INTERVAL_S
            line = f"{progress.stage}: {progress.done:,} of {progress.total:,} {progress.unit}"
            print(f"{line}  {note}".rstrip(), file=self._console.file, flush=True)


def print_report(done: Prepared, run: PrepareDataRun, console: Console) -> None:
    """Say what was made and what was left out."""
    lines = [f"prepared {run.output}"]
    if done.reused_parts == done.parts:
        lines[0] += " (nothing had changed)"
    elif done.reused_parts:
        lines[0] += f" ({done.reused_parts} of {done.parts} parts were done by an earlier try)"
    lines.append(f"  source      {done.files:,} files, {done.source_bytes:,} bytes")
    for split in done.documents:
        lines.append(
            f"  {split:11} {done.documents[split]:,} documents, {done.tokens[split]:,} tokens, "
            f"{done.text_bytes[split]:,} bytes of text, {done.shards[split]:,} shards, "
            f"digest {done.digests[split][:12]}"
        )
    asked = run.tokenizer.train_vocab_size or 0
    fewer = f" of {asked:,}: the text has no more to merge" if done.vocab_size < asked else ""
    lines.append(f"  vocabulary  {done.vocab_size:,} tokens{fewer}")
    reasons = [f"{count:,} {reason}" for reason, count in done.skipped.items()]
    lines.append(f"  skipped     {', '.join(reasons) or 'none'}")
    lines += [f"              {key} first: {at}" for key, at in done.skipped_first.items()]
    for place, source in done.sources.items():
        share = 1 - source["tokens_left"] / max(source["tokens"], 1)
        lines.append(
            f"  copies      {source['copies']:,} equal and {source['near_copies']:,} near ones of "
            f"{source['documents']:,} documents, {share:.1%} of {source['tokens']:,} tokens, left "
            f"out of {place}"
        )
    if done.replaced_utf8:
        lines.append(f"  mended      {done.replaced_utf8:,} documents that were not UTF-8")
    if not done.documents["validation"]:
        lines.append("  note        validation is empty: raise validation_fraction")
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)


def _note(progress: Progress, first_tokens: int, elapsed_s: float) -> str:
    parts = [f"{progress.documents:,} documents"] if progress.documents else []
    if progress.tokens:
        speed = (progress.tokens - first_tokens) / max(elapsed_s, 1e-3)
        parts += [f"{progress.tokens:,} tokens", f"{speed:,.0f} tokens/s"]
    return ", ".join(parts)
