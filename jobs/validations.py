"""Validations of checkpoints beside the training that goes on, as Ray tasks.

Which checkpoints await one is written in their markers, so it outlives workers and drivers. One
after the other is validated, in the order of steps, by a process of its own. If training is faster,
no more of them wait than checkpoint.keep_latest: the oldest are left out, and said, for they cost
disk. With export=best each may become the model, so all wait.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from jobs.attempt import Attempt
from jobs.worker_group import worker_group
from nsa_platform import storage
from nsa_platform.config.train import ClusterConfig
from nsa_platform.retry import first_line, retried
from nsa_platform.tracking import RunHandle, Tracker
from nsa_platform.train.snapshot_validation import validate_snapshot
from nsa_platform.train.snapshots import (
    Snapshot,
    awaiting_validation,
    prune,
    settle,
    snapshot_name,
)
from nsa_platform.train.task import Outcome, Task


@dataclass
class _Run:
    """What is known of a run's checkpoints."""

    task: Task
    is_due: bool
    """Whether its checkpoints are to be looked through."""
    has_grown: bool = True
    """Whether there may be more of them since it was made sure that not too many wait."""
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    """Of each step that was validated."""
    given_up: set[int] = field(default_factory=set)
    running: ray.ObjectRef | None = None
    step: int = 0
    """Of the validation that runs."""

    @property
    def folder(self) -> str:
        return storage.join(self.task.folder, "checkpoints")


class Validations:
    """Of the runs that one group of workers goes through. Nothing here waits."""

    def __init__(
        self,
        attempts: Sequence[Attempt],
        *,
        say: Callable[[str], None],
        validated: Callable[[int, Mapping[str, float]], None],
    ) -> None:
        """say: told a line that a person should read. validated: told a step and its metrics."""
        self._cluster = attempts[0].run.cluster
        # What an earlier attempt has left is looked for at once.
        self._runs = [
            _Run(attempt.task(None), is_due=attempt.inputs.facts is not None)
            for attempt in attempts
        ]
        self._say, self._validated = say, validated

    def look(self, number: int) -> None:
        """A checkpoint of that run may await its validation."""
        self._runs[number].is_due = self._runs[number].has_grown = True

    def poll(self) -> None:
        """Begin what can begin and take in what is done."""
        for run in self._runs:
            if run.running is not None and ray.wait([run.running], timeout=0)[0]:
                self._take_in(run, run.running)
            if run.has_grown:
                self._leave_out(run)
            if run.running is None and run.is_due:
                self._begin_next(run)

    def are_over(self, number: int) -> bool:
        """Whether no checkpoint of a run awaits its validation, as far as is known."""
        run = self._runs[number]
        return run.running is None and not run.is_due

    def concluded(self, number: int, outcome: Outcome) -> Outcome:
        """A run's outcome with the metrics of its last step's validation; what only validations
        have kept of its checkpoints is deleted."""
        run = self._runs[number]
        if not run.metrics and not run.given_up:
            return outcome
        stage = run.task.stages[-1]
        try:
            prune(
                run.folder,
                newest=outcome.step,
                since=stage.first_step,
                config=stage.train.checkpoint,
            )
        except OSError as error:
            self._say(f"old checkpoints were not deleted: {first_line(error)}")
        return replace(outcome, metrics=outcome.metrics | run.metrics.get(outcome.step, {}))

    def stop(self) -> None:
        """End what runs; the next attempt does it again."""
        for run in self._runs:
            run.is_due = False
            if run.running is not None:
                ray.cancel(run.running, force=True)
                run.running = None

    def _leave_out(self, run: _Run) -> None:
        """Let no more checkpoints wait than may, besides the one whose validation is at work."""
        config = run.task.stages[-1].train.checkpoint
        left_out: list[int] = []
        try:
            if config.export == "last":
                waiting = [
                    each
                    for each in awaiting_validation(run.folder)
                    if run.running is None or each.step != run.step
                ]
                room = config.keep_latest + (run.running is None)
                for each in waiting[:-room]:
                    settle(each, {})
                    left_out.append(each.step)
            run.has_grown = False
        except OSError:
            # Storage is away; the next poll may find it.
            pass
        if left_out:
            steps = ", ".join(map(str, left_out))
            self._say(f"validations take longer than training: left out that of step {steps}")

    def _begin_next(self, run: _Run) -> None:
        try:
            awaiting = awaiting_validation(run.folder)
        except OSError:
            # Storage is away; the next look may find it.
            return
        steps = [each.step for each in awaiting if each.step not in run.given_up]
        run.is_due = bool(steps)
        if steps:
            run.step = steps[0]
            run.running = _validation(self._cluster).remote(run.task, run.step, self._probed(run))

    def _probed(self, run: _Run) -> int:
        """The workers look at one microbatch each, as many as rows are dealt ways."""
        mesh = run.task.stage_at(run.step - 1).train.mesh
        return mesh.data_workers(self._cluster.num_workers)

    def _take_in(self, run: _Run, done: ray.ObjectRef) -> None:
        run.running = None
        try:
            metrics, lines = ray.get(done)
        except RayError as error:
            self._give_up(run, error)
            return
        for line in lines:
            self._say(line)
        run.metrics[run.step] = metrics
        self._validated(run.step, metrics)

    def _give_up(self, run: _Run, error: RayError) -> None:
        cause = error.cause if isinstance(error, RayTaskError) else error
        reason = f"{type(cause).__name__}: {first_line(cause)}"
        self._say(f"checkpoint of step {run.step} was not validated, training goes on: {reason}")
        run.given_up.add(run.step)
        try:
            settle(Snapshot(run.step, storage.join(run.folder, snapshot_name(run.step))), {})
        except OSError as away:
            self._say(f"the next attempt will try again: {first_line(away)}")


def _validation(cluster: ClusterConfig) -> Any:
    """The task, with what one worker of the training has. One that dies is begun once more."""
    return ray.remote(_validate).options(
        name="validation",
        num_cpus=cluster.cpus_per_worker,
        num_gpus=1 if cluster.use_gpu else 0,
        max_retries=1,
    )


def _validate(task: Task, step: int, probed: int) -> tuple[dict[str, float], list[str]]:
    """Metrics, and lines that a person should read."""
    lines: list[str] = []
    metrics: dict[str, float] = {}
    tracker = Tracker(RunHandle.from_dict(task.handle), creates_run=False)
    try:
        with worker_group() as world:

            def validate() -> None:
                metrics.update(
                    validate_snapshot(
                        task, step, world=world, tracker=tracker, say=lines.append, probed=probed
                    )
                )

            what = f"validation of step {step}"
            retried(validate, what, say=lines.append, final=(storage.MissingFileError,))
    finally:
        # What has not arrived is told by the driver, which delivers last.
        tracker.finish(None, report=False)
    return metrics, lines
