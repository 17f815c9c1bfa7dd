"""Ray Train's fit() beside a thread that shows what it tells and can be interrupted."""

import threading
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue

from jobs.progress import TrainingProgress
from nsa_platform.train.task import Outcome

POLL_S = 0.3
# Within this time a controller has started, or has ended after it was killed.
CONTROLLER_S = 30


class HopelessRun(RuntimeError):
    """A worker met what no restart can help with; the message is its reason."""


class Fitting:
    """One call of fit() in a thread of its own.

    That thread has ended before anything is returned or raised here: Ray aborts a process that
    disconnects while one of its threads waits for Ray.
    """

    def __init__(self, trainer: TorchTrainer, events: Queue, progress: TrainingProgress) -> None:
        """events: what the workers and the controller tell (failures.py) comes from here."""
        self._trainer = trainer
        self._events = events
        self._progress = progress
        self._controller: Any = None
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, name="fit", daemon=True)

    def outcome(self) -> Outcome:
        """Train to the end.

        Raises:
            HopelessRun: a worker has said that trying again is useless.
            TrainingFailedError: as fit() does.
        """
        self._thread.start()
        try:
            while self._thread.is_alive():
                self._thread.join(POLL_S)
                for event in self._news():
                    self._show(event)
        finally:
            self._stop()
        if self._error is not None:
            raise self._error
        return self._result.return_value

    def _fit(self) -> None:
        try:
            self._result = self._trainer.fit()
        # Whatever ends the training is raised again by the thread that waits for it.
        except BaseException as error:
            self._error = error

    def _news(self) -> list[dict[str, Any]]:
        """What was told since the last call, but for the controller, which is kept."""
        events = self._events.get_nowait_batch(self._events.size())
        for event in events:
            self._controller = event.get("controller", self._controller)
        return [event for event in events if "controller" not in event]

    def _show(self, event: dict[str, Any]) -> None:
        if "fatal" in event:
            raise HopelessRun(event["fatal"])
        if "line" in event:
            self._progress.line(event["line"])
        else:
            self._progress.step(event["step"], event["metrics"])

    def _stop(self) -> None:
        """End the controller, and with it its workers, unless fit() has ended by itself."""
        for _ in range(int(CONTROLLER_S / POLL_S)):
            if self._controller is not None or not self._thread.is_alive():
                break
            self._thread.join(POLL_S)
            self._news()
        if self._controller is not None and self._thread.is_alive():
            ray.kill(self._controller)
        self._thread.join(CONTROLLER_S)
