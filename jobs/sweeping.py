"""The driver of a sweep: which runs it has, and their way through workers that stay."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ray.exceptions import RayError
from ray.train import TrainingFailedError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.attempt import Attempt, AttemptError
from jobs.cluster import connect, lost_cluster
from jobs.fitting import HopelessRun, fit
from jobs.lock import alone
from jobs.progress import TrainingProgress
from jobs.sweep_record import Trial, record_of, write_record
from jobs.trainer import make_fitting, num_validators, say_if_too_small
from jobs.training_inputs import Inputs, find_origin, inspect, private_folder, read_finished
from nsa_platform import storage
from nsa_platform.config.base import ConfigError, read_yaml
from nsa_platform.config.locations import resolve_locations
from nsa_platform.config.runs import PretrainRun, SweepRun
from nsa_platform.model.cost import count_parameters
from nsa_platform.train.task import Outcome


@dataclass
class Sweep:
    """All runs of a sweep, and what those that are finished have come to."""

    config: SweepRun
    trials: tuple[Trial, ...]
    lost: list[str] = field(default_factory=list)
    """Why runs have come to nothing."""

    @classmethod
    def plan(cls, config: SweepRun) -> Self:
        """Resolve every run.

        Raises:
            ConfigError: the base or one of them is wrong, or wants other workers than the first.
        """
        try:
            read_yaml(config.base)
        except ConfigError as error:
            raise ConfigError(f"base: {error}") from None
        trials = [
            Trial(variant.name, seed, _resolve(config, number, seed))
            for number, variant in enumerate(config.variants)
            for seed in variant.seeds or config.seeds
        ]
        first = trials[0].run
        for trial in trials:
            if (trial.run.cluster, trial.run.storage) != (first.cluster, first.storage):
                raise ConfigError(
                    f"{trial.variant}: cluster and storage must be those of {trials[0].variant}: "
                    "all runs of a sweep share workers and a folder"
                )
        return cls(config, tuple(trials))

    @property
    def folder(self) -> str:
        """Of results, report and figures."""
        return storage.join(self.trials[0].run.storage, self.config.name)

    def show(self) -> None:
        """Print a row for each variant; nothing is started.

        Raises:
            ValueError, OSError, RuntimeError: a model that a variant starts from cannot be read.
        """
        table = Table("variant", "seeds", "parameters", "steps", "tokens", "overrides", box=None)
        for variant in self.config.variants:
            trials = [trial for trial in self.trials if trial.variant == variant.name]
            run = trials[0].run
            steps = run.in_stages()[-1].last_step
            model = find_origin(run).model
            table.add_row(
                variant.name,
                ", ".join(str(trial.seed) for trial in trials),
                f"{count_parameters(model).total:,}",
                f"{steps:,}",
                f"{steps * run.train.tokens_per_step:,}",
                escape(" ".join(variant.overrides)),
            )
        Console(width=140, highlight=False).print(table)

    def run(self) -> list[str]:
        """Train what is not finished, and record after each run; why some have come to nothing.

        Raises:
            ValueError, OSError, RuntimeError: data, checkpoints or locks of a run are not as they
                must be, before anything is trained; or workers have failed for good.
        """
        console = Console(highlight=False, soft_wrap=True)
        with ExitStack() as stack:
            lock = private_folder(self.trials[0].run).with_name(f"{self.config.name}.lock")
            stack.enter_context(alone(lock, what=f"{self.config.name} is being trained"))
            todo: list[tuple[Trial, Inputs]] = []
            for trial in self.trials:
                inputs = inspect(trial.run, find_origin(trial.run))
                trial.finished = read_finished(trial.run, inputs)
                if trial.finished is None:
                    todo.append((trial, inputs))
            count = len(self.trials) - len(todo)
            console.print(f"{count} of {len(self.trials)} runs are finished")
            if todo:
                self._train(todo, console)
        self.record()
        console.print(f"results  {storage.join(self.folder, 'results.json')}", markup=False)
        return self.lost

    def _train(self, todo: Sequence[tuple[Trial, Inputs]], console: Console) -> None:
        """Deal the runs to as many groups of workers as may train at once."""
        lanes = min(self.config.at_once, len(todo))
        cluster = todo[0][0].run.cluster
        begun = [_Lane(self, todo[first::lanes]) for first in range(lanes)]
        runs = [trial.run for trial, _ in todo]
        cpus = lanes * (cluster.num_workers + num_validators(runs)) * cluster.cpus_per_worker
        try:
            with connect(num_cpus=cpus), ExitStack() as shown:
                # Live lines of several groups would overwrite each other.
                plain = Console(highlight=False, soft_wrap=True, force_terminal=False)
                fittings = []
                for lane in begun:
                    progress = TrainingProgress(0, plain, with_names=True)
                    shown.enter_context(progress)
                    say_if_too_small(runs, progress)
                    fittings.append(
                        make_fitting(
                            lane.attempts,
                            folder=self.folder,
                            progress=progress,
                            concluded=lane.conclude,
                        )
                    )
                fit(fittings)
        except (HopelessRun, TrainingFailedError) as error:
            raise RuntimeError(f"{self.config.name} cannot go on: {error}") from error
        except RayError as error:
            raise RuntimeError(f"{self.config.name} stopped: {lost_cluster(error)}") from error
        except KeyboardInterrupt:
            for lane in begun:
                lane.end("KILLED")
            raise
        finally:
            for lane in begun:
                lane.end("FAILED")
            storage.delete_tree(storage.join(self.folder, "ray"))

    def record(self) -> None:
        write_record(record_of(self.config, self.trials), self.trials[0].run, self.folder)


class _Lane:
    """Runs that one group of workers goes through in order."""

    def __init__(self, sweep: Sweep, todo: Sequence[tuple[Trial, Inputs]]) -> None:
        self._sweep = sweep
        self._trials = [trial for trial, _ in todo]
        self._open = set(range(len(todo)))
        self._began = time.monotonic()
        self.attempts = [
            Attempt.begin("pretrain", trial.run, find_origin(trial.run), inputs)
            for trial, inputs in todo
        ]

    def conclude(self, number: int, outcome: Outcome) -> None:
        """A run is over: close it and record the sweep so far."""
        if number not in self._open:
            # Workers that were started again have been through it once more.
            return
        self._open.discard(number)
        seconds, self._began = time.monotonic() - self._began, time.monotonic()
        try:
            trial = self._trials[number]
            trial.finished = self.attempts[number].conclude(outcome, seconds=seconds)
        except AttemptError as error:
            self._sweep.lost.append(str(error))
        self._sweep.record()

    def end(self, status: Any) -> None:
        """Close the MLflow runs that have not come to an end."""
        while self._open:
            self.attempts[self._open.pop()].end(status)


def _resolve(config: SweepRun, number: int, seed: int) -> PretrainRun:
    """The run of a variant and a seed."""
    variant = config.variants[number]
    overrides = [
        *config.overrides,
        *variant.overrides,
        f"name={config.name}-{variant.name}-seed{seed}",
        f"train.seed={seed}",
        f"data.seed={seed}",
        f"tracking.parent={config.name}",
    ]
    try:
        return resolve_locations(PretrainRun.load(config.base, overrides), Path.cwd())
    except ConfigError as error:
        raise ConfigError(f"variants.{number} ({variant.name}): {error}") from None
