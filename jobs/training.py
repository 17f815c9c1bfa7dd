"""The driver of pretraining and fine-tuning: check, run on Ray, register, say what came out."""

import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue
from rich.console import Console

from jobs.cli import EXIT_INTERRUPTED, fail
from jobs.cluster import connect
from jobs.failures import ControllerTeller, FailureTeller
from jobs.fitting import Fitting, HopelessRun
from jobs.lock import alone
from jobs.model_tags import model_tags
from jobs.progress import TrainingProgress
from jobs.run_report import REPORT, training_report
from jobs.termination import ResizeSaver, TerminationHeeder
from jobs.training_inputs import (
    Inputs,
    Origin,
    cache_folder,
    inspect,
    keep_start,
    private_folder,
    read_finished,
    run_folder,
    write_finished,
)
from nsa_platform import storage
from nsa_platform.config.runs import PretrainRun, SftRun
from nsa_platform.tracking import RunHandle, Tracker, TrackingError, open_run, register_model
from nsa_platform.train.task import Outcome, Task
from nsa_platform.train.worker import train_worker


def run_training(job: str, run: PretrainRun | SftRun, origin: Origin) -> None:
    """Train, or go on with, the run; ends the process with a status and a line if it fails.

    The status is 0 only if the model is finished, saved, exported and, if asked for, registered.
    """
    console = Console(highlight=False, soft_wrap=True)
    with ExitStack() as stack:
        try:
            inputs = inspect(run, origin)
            lock = private_folder(run) / "driver.lock"
            stack.enter_context(alone(lock, what=f"{run.name} is being trained"))
            finished = read_finished(run, inputs)
            if finished is None:
                origin = keep_start(run, origin)
                storage.write_text(storage.join(run_folder(run), "run.yaml"), run.to_yaml())
        except (ValueError, OSError, RuntimeError) as error:
            fail(str(error))
        if finished is not None:
            _show_finished(run, finished, console)
        else:
            _train_and_record(job, run, origin, inputs, console)


def _show_finished(run: PretrainRun | SftRun, finished: dict[str, Any], console: Console) -> None:
    console.print(f"[bold]{run.name}[/] is finished already", markup=True)
    _deliver_left(run, finished)
    show_result(finished, console)
    if finished["handle"]["uri"] != run.tracking.uri:
        console.print(f"nothing new is recorded in {run.tracking.uri}", markup=False)


def _train_and_record(
    job: str, run: PretrainRun | SftRun, origin: Origin, inputs: Inputs, console: Console
) -> None:
    """Train between the begin and the end of an MLflow run, and close the run's folder."""
    for line in inputs.changes:
        console.print(f"changed since the checkpoint: {line}", markup=False)
    handle = _open_tracking(job, run, origin, inputs)
    status, report, began = "FAILED", "", time.monotonic()
    try:
        outcome = _train(run, origin, inputs, handle)
        seconds = time.monotonic() - began
        result = _conclude(run, outcome, handle)
        report = training_report(run, origin, inputs, result, seconds=seconds)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        console.print("stopped; the same command goes on from the newest checkpoint")
        raise SystemExit(EXIT_INTERRUPTED) from None
    except HopelessRun as error:
        fail(f"{run.name} cannot go on: {error}")
    except TrainingFailedError as error:
        fail(f"{run.name} failed, the same command goes on from the newest checkpoint: {error}")
    finally:
        tracker = Tracker(handle)
        if report:
            tracker.log_text(report, REPORT)
        tracker.finish(status)
    result["run_id"] = tracker.run_id
    _close_folder(run, result, report)
    show_result(result, console)


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


def _open_tracking(
    job: str, run: PretrainRun | SftRun, origin: Origin, inputs: Inputs
) -> RunHandle:
    """A new MLflow run, or the one that the checkpoint or an earlier attempt belongs to."""
    known = inputs.facts["tracking"] if inputs.facts else {}
    same_store = known.get("uri") == run.tracking.uri
    queue_dir = private_folder(run) / "tracking-queue"
    queue_dir.mkdir(parents=True, exist_ok=True)
    params = run.model_dump(mode="json") | {"model": origin.model.model_dump(mode="json")}
    return open_run(
        run.tracking,
        job=job,
        name=run.name,
        params=params,
        tags=model_tags(origin.model, run.in_stages()[-1].data.context_length),
        yaml_text=run.to_yaml(),
        queue_dir=queue_dir,
        run_id=known.get("run_id") if same_store else None,
    )


def _train(run: PretrainRun | SftRun, origin: Origin, inputs: Inputs, handle: RunHandle) -> Outcome:
    """Run the workers to the end and show how they get on."""
    cluster = run.cluster
    with (
        connect(num_cpus=cluster.num_workers * cluster.cpus_per_worker),
        TrainingProgress(run.in_stages()[-1].last_step) as progress,
    ):
        _say_if_too_small(run, progress)
        events = Queue(actor_options={"num_cpus": 0})
        # Ray takes callbacks of the controller too; its annotation names the workers' only.
        callbacks: list[Any] = [
            *(ControllerTeller(events), FailureTeller(events)),
            *(TerminationHeeder(), ResizeSaver()),
        ]
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"task": _task(run, origin, inputs, handle, events)},
            scaling_config=ScalingConfig(
                num_workers=(cluster.min_workers, cluster.num_workers)
                if cluster.min_workers
                else cluster.num_workers,
                use_gpu=cluster.use_gpu,
                resources_per_worker={"CPU": cluster.cpus_per_worker, "GPU": 1}
                if cluster.use_gpu
                else {"CPU": cluster.cpus_per_worker},
            ),
            run_config=RunConfig(
                name=f"attempt-{time.time_ns()}",
                storage_path=storage.join(run_folder(run), "ray"),
                failure_config=FailureConfig(max_failures=cluster.max_failures),
                callbacks=callbacks,
            ),
            torch_config=TorchConfig(backend="nccl" if cluster.use_gpu else "gloo"),
        )
        return Fitting(trainer, events, progress).outcome()


def _task(
    run: PretrainRun | SftRun, origin: Origin, inputs: Inputs, handle: RunHandle, events: Queue
) -> Task:
    tracking = {"uri": run.tracking.uri, "run_id": handle.run_id}
    return Task(
        model=origin.model,
        stages=run.in_stages(),
        cpus=run.cluster.cpus_per_worker,
        folder=run_folder(run),
        start_from=origin.start_from,
        cache_dir=str(cache_folder(run)),
        has_validation=inputs.has_validation,
        described=inputs.described,
        handle=handle.to_dict(),
        identity={"name": run.name, "tracking": tracking},
        events=events,
    )


def _say_if_too_small(run: PretrainRun | SftRun, progress: TrainingProgress) -> None:
    have = ray.cluster_resources()
    workers = run.cluster.min_workers or run.cluster.num_workers
    need = {"CPU": workers * run.cluster.cpus_per_worker}
    if run.cluster.use_gpu:
        need["GPU"] = workers
    for name, amount in need.items():
        if have.get(name, 0) < amount:
            progress.line(
                f"the cluster has {have.get(name, 0):g} {name}, the run needs {amount}: it waits "
                "until there are enough (Ctrl-C stops it)"
            )


def _conclude(run: PretrainRun | SftRun, outcome: Outcome, handle: RunHandle) -> dict[str, Any]:
    """Register the model; what the run has come to. Ends the process if it has come to less."""
    if outcome.problem is not None:
        fail(f"{run.name} stopped after step {outcome.step}: {outcome.problem}")
    if outcome.step in outcome.failed_checkpoints:
        fail(
            f"{run.name} is trained and its model is in {run_folder(run)}/model, but its last "
            "checkpoint could not be written; the same command trains again from the one before"
        )
    model = storage.join(run_folder(run), "model")
    registered = None
    if run.tracking.registered_model is not None:
        name, alias = run.tracking.registered_model, run.tracking.alias
        try:
            version = register_model(handle, storage.fetch(model, cache_folder(run)), name, alias)
        except (TrackingError, OSError) as error:
            fail(f"{run.name} is trained and its model is in {model}, but: {error}")
        registered = f"models:/{name}@{alias} (version {version})"
    return {
        **asdict(outcome),
        "model": model,
        "registered": registered,
        "handle": handle.to_dict(),
    }


def _close_folder(run: PretrainRun | SftRun, result: dict[str, Any], report: str = "") -> None:
    """Leave the result for whoever starts the run again and the report for people, and tidy up."""
    try:
        if report:
            storage.write_text(storage.join(run_folder(run), REPORT), report)
        write_finished(run, result)
        # Ray's own notes of the attempts; nothing reads them again.
        storage.delete_tree(storage.join(run_folder(run), "ray"))
    except OSError as error:
        fail(f"{run.name} is trained and its model is in {result['model']}, but: {error}")


def _deliver_left(run: PretrainRun | SftRun, finished: dict[str, Any]) -> None:
    """Points that the tracking store has not taken when the run ended may arrive now."""
    if any((private_folder(run) / "tracking-queue").glob("*.jsonl")):
        tracker = Tracker(RunHandle.from_dict(finished["handle"]))
        tracker.finish("FINISHED")
        finished["run_id"] = tracker.run_id
        _close_folder(run, finished)
