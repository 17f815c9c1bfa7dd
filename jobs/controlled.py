"""Ray Train's trainer, whose controller can be ended from the moment in which fit() asks for it."""

import threading
from typing import Any

import ray
from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController

from jobs.cluster import this_node


class ControlledTrainer(TorchTrainer):
    """A TorchTrainer whose fit() may run in any thread and is ended by end().

    Ray Train keeps the handle of its controller to itself, and only the controller's end ends a
    fit(). Until it is up, which takes seconds where the machine is busy, nobody could tell it.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lock = threading.Lock()
        self._controller: Any = None
        self._is_ended = False

    def end(self) -> None:
        """End the controller, and with it its workers; a fit() raises, now or when it begins."""
        with self._lock:
            self._is_ended = True
            if self._controller is not None:
                ray.kill(self._controller)

    def _create_default_callbacks(self) -> list[Any]:
        """Ray Train's own, but for the one that starts a process to share out Ray's datasets:
        workers read shards themselves."""
        callbacks = super()._create_default_callbacks()
        return [each for each in callbacks if not isinstance(each, DatasetsCallback)]

    def _initialize_and_run_controller(self, **options: Any) -> Result:
        """As Ray Train does it, beside the driver, but for the handle that is kept."""
        environment = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0", **get_env_vars_to_propagate()}
        actor = ray.remote(TrainController).options(
            num_cpus=0, scheduling_strategy=this_node(), runtime_env={"env_vars": environment}
        )
        with self._lock:
            if self._is_ended:
                raise InterruptedError("ended before its controller was asked for")
            controller: Any = actor.remote(**options)
            self._controller = controller
        ray.get(controller.run.remote())
        result: Any = ray.get(controller.get_result.remote())
        return result
