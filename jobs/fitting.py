"""Ray Train's fit() beside a thread that shows what it tells and can be interrupted."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ray.util.queue import Queue

from jobs.controlled import ControlledTrainer
from jobs.progress import TrainingProgress
from jobs.validations import Validations
from nsa_platform.train.task import Outcome

POLL_S = 0.3
# Within this time fit() has ended after its controller was killed.
CONTROLLER_S = 30


class HopelessRun(RuntimeError):
    """A worker met what no restart can help with; the message is its reason."""


class Fitting:
    """One call of Ray Train's fit() in a thread of its own.

    That thread has ended before anything is returned or raised here: Ray aborts a process that
    disconnects while one of its threads waits for Ray.
    """

    def __init__(
        self,
        trainer: ControlledTrainer,
        events: Queue,
        progress: TrainingProgress,
        validations: Validations,
        concluded: Callable[[int, Outcome], None] | None = None,
    ) -> None:
        """events: what the workers and the controller (failures.py) tell comes from here.

        validations: of the tasks' checkpoints, beside the training.
        concluded: told the number of a task and its outcome as soon as it is done and validated.
        """
        self._trainer = trainer
        self._events = events
        self._progress = progress
        self._validations = validations
        self._ended: dict[int, Outcome] = {}
        """Tasks that are done, of which checkpoints are still being validated."""
        self._concluded = concluded
        self._has_said_so = False
        self._outcomes: dict[int, Outcome] = {}
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, name="fit", daemon=True)

    @property
    def is_fitting(self) -> bool:
        """Whether fit() has begun and not ended."""
        return self._thread.is_alive()

    @property
    def is_validating(self) -> bool:
        """Whether fit() has ended well, and checkpoints are still being validated."""
        return self._error is None and bool(self._ended)

    def start(self) -> None:
        """Begin; nothing is shown before poll() is called."""
        self._thread.start()

    def poll(self) -> None:
        """Show and hand on what was told since the last call, and have checkpoints validated.

        Raises:
            HopelessRun: a worker has said that trying again is useless.
        """
        for event in self._news():
            self._show(event)
        self._validations.poll()
        for number in [each for each in self._ended if self._validations.are_over(each)]:
            outcome = self._validations.concluded(number, self._ended.pop(number))
            self._outcomes[number] = outcome
            if self._concluded is not None:
                self._concluded(number, outcome)
        if self.is_validating and not self.is_fitting and not self._has_said_so:
            self._has_said_so = True
            self._progress.line("all steps are done; their checkpoints are still validated")

    def outcomes(self) -> list[Outcome]:
        """Of all tasks, when fit() has ended and their checkpoints are validated.

        Raises:
            TrainingFailedError: as fit() does.
        """
        if self._error is not None:
            raise self._error
        return [self._outcomes[number] for number in sorted(self._outcomes)]

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        # Whatever ends the training is raised again by the thread that waits for it.
        except BaseException as error:
            self._error = error

    def _news(self) -> list[dict[str, Any]]:
        """What was told since the last call."""
        return self._events.get_nowait_batch(self._events.size())

    def _show(self, event: dict[str, Any]) -> None:
        if "fatal" in event:
            raise HopelessRun(event["fatal"])
        if "line" in event:
            self._progress.line(event["line"])
        elif "begins" in event:
            self._progress.begin(event["begins"], event["steps"])
        elif "awaited" in event:
            self._validations.look(event["number"])
        elif "outcome" in event:
            self._ended[event["number"]] = event["outcome"]
            self._validations.look(event["number"])
        else:
            self._progress.step(event["step"], event["metrics"])

    def stop(self) -> None:
        """End the controller, and with it its workers, unless fit() has ended by itself; and the
        validations."""
        self._validations.stop()
        if self._thread.is_alive():
            self._trainer.end()
            self._thread.join(CONTROLLER_S)


def fit(fittings: Sequence[Fitting]) -> list[list[Outcome]]:
    """Train all of them at once to their ends.

    Raises:
        HopelessRun: a worker has said that trying again is useless; the others are stopped.
        TrainingFailedError: as fit() does, when the others have ended.
    """
    try:
        for each in fittings:
            each.start()
        is_running = True
        while is_running:
            time.sleep(POLL_S)
            # What is told before the end is still to be shown after it.
            is_running = any(each.is_fitting for each in fittings)
            for each in fittings:
                each.poll()
            is_running |= any(each.is_validating for each in fittings)
    finally:
        for each in fittings:
            each.stop()
    return [each.outcomes() for each in fittings]
