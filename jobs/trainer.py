"""Ray Train for training runs: one group of workers, which goes through them one after another."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig
from ray.util.queue import Queue

from jobs.attempt import Attempt
from jobs.cluster import this_node
from jobs.controlled import ControlledTrainer
from jobs.failures import FailureTeller
from jobs.fitting import Fitting
from jobs.progress import TrainingProgress
from jobs.termination import ResizeSaver, TerminationHeeder
from jobs.validations import Validations
from nsa_platform import storage
from nsa_platform.config.runs import PretrainRun, SftRun
from nsa_platform.train.task import Outcome
from nsa_platform.train.worker import train_worker


def make_fitting(
    attempts: Sequence[Attempt],
    *,
    folder: str,
    progress: TrainingProgress,
    concluded: Callable[[int, Outcome], None] | None = None,
) -> Fitting:
    """Workers that are going to train the attempts, which must want the same cluster.

    Args:
        folder: where Ray Train keeps its notes, below a folder `ray`, local or s3://.
        concluded: told the number of an attempt among these and its outcome, when it is done.
    """
    cluster = attempts[0].run.cluster
    events = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": this_node()})
    # Ray takes callbacks of the controller too; its annotation names the workers' only.
    callbacks: list[Any] = [FailureTeller(events), TerminationHeeder(), ResizeSaver(events)]
    trainer = ControlledTrainer(
        train_worker,
        train_loop_config={"tasks": tuple(attempt.task(events) for attempt in attempts)},
        scaling_config=ScalingConfig(
            num_workers=(cluster.min_workers, cluster.num_workers)
            if cluster.min_workers
            else cluster.num_workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, "GPU": 1}
            if cluster.use_gpu
            else {"CPU": cluster.cpus_per_worker},
            elastic_resize_monitor_interval_s=cluster.grow_check_s,
        ),
        run_config=RunConfig(
            name=f"attempt-{time.time_ns()}",
            storage_path=storage.join(folder, "ray"),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=callbacks,
        ),
        torch_config=TorchConfig(backend="nccl" if cluster.use_gpu else "gloo"),
    )
    validations = Validations(attempts, say=progress.line, validated=progress.validated)
    return Fitting(trainer, events, progress, validations, concluded)


def say_if_too_small(runs: Sequence[PretrainRun | SftRun], progress: TrainingProgress) -> None:
    """A line for each resource that the cluster lacks: the runs, which want the same cluster, wait
    until it has it."""
    have, cluster = ray.cluster_resources(), runs[0].cluster
    workers = (cluster.min_workers or cluster.num_workers) + num_validators(runs)
    need = {"CPU": workers * cluster.cpus_per_worker}
    if cluster.use_gpu:
        need["GPU"] = workers
    for name, amount in need.items():
        if have.get(name, 0) < amount:
            progress.line(
                f"the cluster has {have.get(name, 0):g} {name}, the run needs {amount}: it waits "
                "until there are enough (Ctrl-C stops it)"
            )


def num_validators(runs: Sequence[PretrainRun | SftRun]) -> int:
    """Workers besides those that train, which validate while those train on."""
    return int(any(run.train.validation == "asynchronous" for run in runs))
