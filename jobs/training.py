"""The driver of pretraining and fine-tuning: check, run on Ray, register, say what came out."""

import time
from contextlib import ExitStack
from typing import Any

from ray.exceptions import RayError
from ray.train import TrainingFailedError
from rich.console import Console

from jobs.attempt import Attempt, AttemptError, close_folder
from jobs.cli import EXIT_INTERRUPTED, fail
from jobs.cluster import connect, lost_cluster
from jobs.fitting import HopelessRun, fit
from jobs.lock import alone
from jobs.progress import TrainingProgress
from jobs.trainer import make_fitting, num_validators, say_if_too_small
from jobs.training_inputs import (
    Origin,
    inspect,
    make_private_folder,
    private_folder,
    read_finished,
    run_folder,
)
from nsa_platform.config.runs import PretrainRun, SftRun
from nsa_platform.tracking import RunHandle, Tracker
from nsa_platform.train.task import Outcome


def run_training(job: str, run: PretrainRun | SftRun, origin: Origin) -> None:
    """Train, or go on with, the run; ends the process with a status and a line if it fails.

    The status is 0 only if the model is finished, saved, exported and, if asked for, registered.
    """
    console = Console(highlight=False, soft_wrap=True)
    with ExitStack() as stack:
        try:
            inputs = inspect(run, origin)
            lock = make_private_folder(run) / "driver.lock"
            stack.enter_context(alone(lock, what=f"{run.name} is being trained"))
            finished = read_finished(run, inputs)
            if finished is not None:
                _show_finished(run, finished, console)
                return
            for line in inputs.changes:
                console.print(f"changed since the checkpoint: {line}", markup=False)
            attempt = Attempt.begin(job, run, origin, inputs)
        except (ValueError, OSError, RuntimeError) as error:
            fail(str(error))
        began = time.monotonic()
        outcome = _train(attempt, console)
        try:
            result = attempt.conclude(outcome, seconds=time.monotonic() - began)
        except AttemptError as error:
            fail(str(error))
        show_result(result, console)


def _show_finished(run: PretrainRun | SftRun, finished: dict[str, Any], console: Console) -> None:
    console.print(f"[bold]{run.name}[/] is finished already", markup=True)
    _deliver_left(run, finished)
    show_result(finished, console)
    if finished["handle"]["uri"] != run.tracking.uri:
        console.print(f"nothing new is recorded in {run.tracking.uri}", markup=False)


def _train(attempt: Attempt, console: Console) -> Outcome:
    """Run the workers to the end and show how they get on; a failure ends the process."""
    run, status = attempt.run, "FAILED"
    try:
        outcome = _fit(attempt)
        status = None
        return outcome
    except KeyboardInterrupt:
        status = "KILLED"
        console.print("stopped; the same command goes on from the newest checkpoint")
        raise SystemExit(EXIT_INTERRUPTED) from None
    except HopelessRun as error:
        fail(f"{run.name} cannot go on: {error}")
    except TrainingFailedError as error:
        fail(f"{run.name} failed, the same command goes on from the newest checkpoint: {error}")
    except RayError as error:
        fail(f"{run.name} stopped: {lost_cluster(error)}")
    finally:
        if status is not None:
            attempt.end(status)


def _fit(attempt: Attempt) -> Outcome:
    run, cluster = attempt.run, attempt.run.cluster
    workers = cluster.num_workers + num_validators([run])
    with (
        connect(num_cpus=workers * cluster.cpus_per_worker),
        TrainingProgress(run.in_stages()[-1].last_step) as progress,
    ):
        say_if_too_small([run], progress)
        fitting = make_fitting([attempt], folder=run_folder(run), progress=progress)
        return fit([fitting])[0][0]


def show_result(result: dict[str, Any], console: Console) -> None:
    """The numbers and places that a person wants at the end."""
    if result["first_loss"] is not None:
        line = f"loss {result['first_loss']:.3f} -> {result['last_loss']:.3f}"
        if "valid/loss" in result["metrics"]:
            line += f", held-out {result['metrics']['valid/loss']:.3f}"
        if "valid/bits_per_byte" in result["metrics"]:
            line += f", {result['metrics']['valid/bits_per_byte']:.3f} bits per byte"
        console.print(f"{line} after {result['step']} steps", markup=False)
    console.print(f"model    {result['model']}", markup=False)
    if result["registered"]:
        console.print(f"registry {result['registered']}", markup=False)
    where = f"run {result['run_id']}" if result["run_id"] else "a run that waits to be delivered"
    console.print(f"MLflow   {where} in {result['handle']['uri']}", markup=False)


def _deliver_left(run: PretrainRun | SftRun, finished: dict[str, Any]) -> None:
    """Points that the tracking store has not taken when the run ended may arrive now."""
    if any((private_folder(run) / "tracking-queue").glob("*.jsonl")):
        tracker = Tracker(RunHandle.from_dict(finished["handle"]))
        tracker.finish("FINISHED")
        finished["run_id"] = tracker.run_id
        close_folder(run, finished)
