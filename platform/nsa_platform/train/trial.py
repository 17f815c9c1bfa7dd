"""A trial: a few steps of a run on random tokens, to see how long they take and what they hold.

Nothing is read and nothing is saved; the steps are those of the training.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nsa_platform.config.model import ModelConfig
from nsa_platform.config.stages import Stage
from nsa_platform.data.loader import Batch
from nsa_platform.train.build import build_mesh, build_model, forget_earlier_models
from nsa_platform.train.loss import IGNORED
from nsa_platform.train.mesh import Mesh
from nsa_platform.train.metrics import StepClock, memory_metrics, throughput_of
from nsa_platform.train.optimizer import build_optimizer, set_learning_rate
from nsa_platform.train.parallel import World
from nsa_platform.train.progress import Progress
from nsa_platform.train.schedule import Schedule
from nsa_platform.train.step import take_step


@dataclass(frozen=True, slots=True)
class Tried:
    """What a trial found."""

    step_s: list[float]
    """Seconds of each step that was measured, in their order."""
    metrics: dict[str, float]
    """Of the median step, as the training names them, and the memory of all of them."""
    compiled_graphs: int
    """Graphs that torch.compile made of layers for these steps; 0 without it."""
    graph_breaks: int
    """Places where it had to leave a graph."""


class Subject:
    """A model with its optimizer as a run trains it, for trials of any context length."""

    def __init__(self, model: ModelConfig, stage: Stage, world: World) -> None:
        """Build them; every worker does. The default process group must be initialised.

        Raises:
            ValueError: these workers cannot form the mesh, or the model cannot be shared so.
        """
        self._config, self._world = model, world
        length = stage.data.context_length
        forget_earlier_models(stage.train)
        self._mesh = build_mesh(model, stage.train, context_length=length, world=world)
        self._model = build_model(model, stage.train, world=world, mesh=self._mesh)
        self._optimizer = build_optimizer(self._model, stage.train.optimizer)

    def tried(self, stage: Stage, *, warm_up: int, steps: int) -> Tried:
        """Take `warm_up` steps, then `steps` measured ones; every worker calls it.

        The stage may differ from the one the subject was built for in its rows alone: their
        length, and how many are in a step and in a microbatch.
        """
        train, device = stage.train, self._world.device
        forget_earlier_models(train)
        if train.compile:
            torch._dynamo.utils.counters.clear()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        throughput = throughput_of(stage, self._config, self._world)
        schedule = Schedule(train.optimizer, start=0, end=warm_up + steps)
        progress, measured = Progress.from_facts(None, train.guard), []
        rows = random_steps(stage, self._config, self._mesh)
        while progress.step < warm_up + steps:
            set_learning_rate(self._optimizer, schedule.rate(progress.step))
            batches, clock = next(rows), StepClock()
            take_step(
                self._model,
                self._optimizer,
                batches,
                config=train,
                world=self._world,
                mesh=self._mesh,
                progress=progress,
            )
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            clock.tick()
            measured.append(throughput.metrics(clock))
        by_time = sorted(measured[warm_up:], key=lambda metrics: metrics["train/step_s"])
        graphs, breaks = _compiled() if train.compile else (0, 0)
        return Tried(
            step_s=[metrics["train/step_s"] for metrics in measured[warm_up:]],
            metrics=by_time[len(by_time) // 2] | memory_metrics(device),
            compiled_graphs=graphs,
            graph_breaks=breaks,
        )


def _compiled() -> tuple[int, int]:
    """Graphs that torch.compile has made since its counters were cleared, and breaks in them."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def random_steps(stage: Stage, model: ModelConfig, mesh: Mesh) -> Iterator[list[Batch]]:
    """This worker's microbatches of step after step: rows of one document of random tokens each."""
    length, rows = stage.data.context_length, stage.train.sequences_per_microbatch
    generator = torch.Generator().manual_seed(stage.data.seed * mesh.data_size + mesh.data_rank)
    ends = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32)
    positions = torch.arange(length, dtype=torch.int32).repeat(rows)
    count = stage.train.tokens_per_step // (mesh.data_size * rows * length)
    while True:
        batches = []
        for _ in range(count):
            ids = torch.randint(model.vocab_size, (rows, length), generator=generator)
            targets = ids.roll(-1, dims=1)
            targets[:, -1] = IGNORED
            batches.append(
                Batch(
                    ids.view(-1), targets.view(-1), positions, ends, num_targets=rows * (length - 1)
                )
            )
        yield batches
