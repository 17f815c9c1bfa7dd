"""What Ray Train runs on each worker: train, and tell the driver and the tracking store."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train.v2._internal.execution.context import get_train_context

from nsa_platform.data.manifest import ShardError
from nsa_platform.data.tokenizer import TokenizerError
from nsa_platform.model.weights import ExportError
from nsa_platform.tracking import RunHandle, SystemMonitor, Tracker
from nsa_platform.train.listeners import Listeners, Metrics
from nsa_platform.train.metrics import device_name
from nsa_platform.train.notice import TERMINATION
from nsa_platform.train.parallel import World
from nsa_platform.train.stages import Training
from nsa_platform.train.task import Events, Outcome, Task

# The driver is told at most this often; its line of progress needs no more.
REPORT_EVERY_S = 0.2

# Broken files: perhaps seen by one worker alone, and again by whoever takes its place.
HOPELESS = (ShardError, TokenizerError, ExportError)


class Voice:
    """Tells the driver, from the first worker, and Ray Train, from all of them."""

    def __init__(self, world: World, events: Events | None, *, number: int, steps: int) -> None:
        self.metrics: dict[str, float] = {}
        self._all_events = events
        self._events = events if world.is_first else None
        self._number = number
        self._steps = steps
        self._told_s = 0.0

    def begin(self, name: str) -> None:
        """A run of that name begins."""
        if self._events is not None:
            self._events.put_nowait({"begins": name, "steps": self._steps})

    def await_validation(self, step: int) -> None:
        """The checkpoint of that step can be validated."""
        if self._events is not None:
            self._events.put_nowait({"number": self._number, "awaited": step})

    def conclude(self, outcome: Outcome) -> None:
        """The run is over."""
        if self._events is not None:
            self._events.put_nowait({"number": self._number, "outcome": outcome})

    def say(self, line: str) -> None:
        """One line for a person."""
        if self._events is not None:
            self._events.put_nowait({"line": line})

    def give_up(self, reason: str) -> None:
        """From any worker: trying again is useless, the driver shall end the run."""
        if self._all_events is not None:
            self._all_events.put_nowait({"fatal": reason})

    def report(self, step: int, metrics: Metrics) -> None:
        """The step's metrics. Ray Train takes few reports a minute: it gets the validations."""
        self.metrics = dict(metrics)
        is_due = step == self._steps or time.monotonic() - self._told_s >= REPORT_EVERY_S
        if self._events is not None and (is_due or "valid/loss" in metrics):
            self._told_s = time.monotonic()
            self._events.put_nowait({"step": step, "metrics": dict(metrics)})
        if "valid/loss" in metrics:
            ray.train.report({"step": step, **metrics})


def train_worker(config: dict[str, Any]) -> list[Outcome]:
    """Train runs, or go on with them, on this worker. `config` holds their Tasks as `tasks`.

    They follow each other in one process, which costs less than a process for each: what libraries
    and kernels took to load and to compile is there for the next. A run that has come to nothing
    does not keep the next from its turn.
    """
    tasks: tuple[Task, ...] = config["tasks"]
    context = ray.train.get_context()
    world = World(
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        device=ray.train.torch.get_device(),
    )
    if world.device.type != "cpu":
        torch.cuda.set_device(world.device)
    return [_train(task, world, number) for number, task in enumerate(tasks)]


def _train(task: Task, world: World, number: int) -> Outcome:
    """Train one run, the `number`th of those that this worker was given."""
    if world.device.type == "cpu":
        torch.set_num_threads(task.cpus)
    else:
        torch.cuda.reset_peak_memory_stats(world.device)
    voice = Voice(world, task.events, number=number, steps=task.steps)
    voice.begin(task.identity["name"])
    with ExitStack() as stack:
        stack.enter_context(_warnings_told(voice))
        tracker = None
        if ray.train.get_context().get_local_rank() == 0:
            tracker = Tracker(RunHandle.from_dict(task.handle), creates_run=world.is_first)
            # What has not arrived is told by the driver, which delivers last.
            stack.callback(tracker.finish, None, report=False)
            stack.callback(SystemMonitor(tracker).stop)
        try:
            told = Listeners(
                voice.report,
                voice.say,
                tracker if world.is_first else None,
                voice.await_validation,
            )
            training = Training(task, world=world, listeners=told, notice=_notice)
            problem = training.run()
        except HOPELESS as error:
            voice.give_up(f"worker {world.rank}: {error}")
            raise
    losses = training.progress.history.train
    outcome = Outcome(
        step=training.progress.step,
        device=device_name(world.device),
        first_loss=losses[0][1] if losses else None,
        last_loss=losses[-1][1] if losses else None,
        metrics=voice.metrics,
        failed_checkpoints=training.failed_checkpoints,
        problem=problem,
    )
    voice.conclude(outcome)
    return outcome


def _notice() -> str | None:
    """Why this worker must leave: it was told to end, or its node is being drained."""
    info = get_train_context().preemption_context.preemption_info
    rank = ray.train.get_context().get_world_rank()
    if info is not None and rank in info.preempted_ranks:
        return "its node is being taken away"
    return TERMINATION()


class _Relay(logging.Handler):
    """Gives warnings to `say`."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())


@contextmanager
def _warnings_told(voice: Voice) -> Iterator[None]:
    """Warnings of the platform, a tracking store out of reach among them, reach the driver."""
    logger, relay = logging.getLogger("nsa_platform"), _Relay(voice.say)
    logger.addHandler(relay)
    try:
        yield
    finally:
        logger.removeHandler(relay)
