"""Batch inference on Ray: one engine in each worker, parts to whoever is free."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from jobs.cluster import connect
from jobs.generation import (
    PARTS,
    Generated,
    GenerationPlan,
    Part,
    PartDone,
    find_model,
    generate_part,
    part_file,
    sampling_params,
)
from jobs.preparation import ProgressDisplay
from nsa_platform import storage
from nsa_platform.config.generate import GenerateRun
from nsa_platform.serve.engine import Engine
from nsa_platform.serve.loading import load_engine


class WorkerLost(RuntimeError):
    """A worker died more often than it may."""


def run_generation(plan: GenerationPlan) -> Generated:
    """Do what a plan says on Ray; the cluster is left alone if nothing is to be done.

    Raises:
        ValueError, OSError: a worker cannot load the model or reach a store.
        WorkerLost: a worker died more often than cluster.max_failures.
    """
    done = plan.finished()
    if done is not None:
        return done
    workers = plan.run.cluster
    with connect(num_cpus=workers.num_workers * workers.cpus_per_worker):
        if workers.use_gpu and not ray.cluster_resources().get("GPU"):
            raise ValueError("cluster.use_gpu=true, but the Ray cluster has no GPU")
        with ProgressDisplay() as display:
            return plan.generate(WorkerPool(plan.run, plan.model), display.show)


class WorkerPool:
    """Gives parts to workers, one at a time to each; workers that come late join in."""

    def __init__(self, run: GenerateRun, model: str) -> None:
        self._run = run
        self._model = model

    def __call__(self, parts: Iterable[Part]) -> Iterator[PartDone]:
        """What came of the parts, in the order in which they are finished."""
        shape = self._run.cluster
        actor = ray.remote(Worker).options(
            num_cpus=shape.cpus_per_worker,
            num_gpus=1 if shape.use_gpu else 0,
            max_restarts=shape.max_failures,
            max_task_retries=shape.max_failures,
            runtime_env={"env_vars": {"RAYON_NUM_THREADS": str(shape.cpus_per_worker)}},
        )
        waiting = iter(parts)
        workers: list[Any] = [
            actor.remote(self._run, self._model) for _ in range(shape.num_workers)
        ]
        busy: dict[ray.ObjectRef, Any] = {worker.load.remote(): worker for worker in workers}
        unfinished = 0
        part = next(waiting, None)
        try:
            while part is not None or unfinished:
                (reference, *_), _ = ray.wait(list(busy), num_returns=1)
                worker = busy.pop(reference)
                done: PartDone | None = ray.get(reference)
                if done is not None:
                    unfinished -= 1
                    yield done
                if part is not None:
                    busy[worker.generate.remote(part)] = worker
                    unfinished += 1
                    part = next(waiting, None)
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            reason = str(error).strip().splitlines()[0]
            raise WorkerLost(
                f"a worker died more than cluster.max_failures={shape.max_failures} times; parts "
                f"that are done are kept: {reason}"
            ) from None
        finally:
            for worker in workers:
                ray.kill(worker)


class Worker:
    """One engine for one part after the other."""

    def __init__(self, run: GenerateRun, model: str) -> None:
        self._run = run
        self._model = model
        self._engine: Engine | None = None

    def load(self) -> None:
        """Have the engine ready.

        Raises:
            ValueError, OSError: the model cannot be loaded, or is no longer the one that was
                planned with.
        """
        self._loaded()

    def generate(self, part: Part) -> PartDone:
        """Generate a part and leave its file, whole, in the output."""
        engine = self._loaded()
        # A part comes out the same whatever this worker did before it.
        engine.reset_prefix_cache()
        results = generate_part(engine, part, sampling_params(self._run.sampling))
        lines = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
        storage.write_text(storage.join(self._run.output, PARTS, part_file(part.name)), lines)
        return PartDone(len(results), sum(result["completion_tokens"] for result in results))

    def _loaded(self) -> Engine:
        # Not when the worker is made: one that Ray starts anew gets no second call of `load`.
        if self._engine is None:
            torch.set_num_threads(self._run.cluster.cpus_per_worker)
            folder = find_model(self._run)
            if folder.name != self._model:
                raise ValueError(
                    f"{self._run.checkpoint} was {self._model} when the job began and is "
                    f"{folder.name} now; start it again"
                )
            device = "cuda" if self._run.cluster.use_gpu else "cpu"
            self._engine = load_engine(folder, self._run.engine, device)
        return self._engine
