"""A worker's way through the stages of a run: put each one's parts together, train, export.

It knows no Ray. A run without stages is one of a single stage.
"""

from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from nsa_platform import storage
from nsa_platform.config.lora import LoraConfig
from nsa_platform.config.model import ModelConfig
from nsa_platform.config.stages import Stage
from nsa_platform.data.loader import Loader, LoaderState
from nsa_platform.data.prefetch import Prefetched
from nsa_platform.data.shards import ShardSet, open_mixture, open_split
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.model.transformer import Transformer
from nsa_platform.tracking import Tracker
from nsa_platform.train.adapters import save_adapter
from nsa_platform.train.build import build_mesh, build_model, forget_earlier_models
from nsa_platform.train.checkpoint import CheckpointStore
from nsa_platform.train.export import export
from nsa_platform.train.guard import TrainingDiverged
from nsa_platform.train.listeners import Listeners
from nsa_platform.train.loop import train
from nsa_platform.train.mesh import Mesh
from nsa_platform.train.metrics import throughput_of
from nsa_platform.train.notice import TERMINATION
from nsa_platform.train.optimizer import build_optimizer
from nsa_platform.train.parallel import World
from nsa_platform.train.preemption import Notice, Preemption
from nsa_platform.train.profiling import profiled_steps
from nsa_platform.train.progress import Progress
from nsa_platform.train.schedule import Schedule
from nsa_platform.train.snapshot_validation import read_validations
from nsa_platform.train.snapshots import CheckpointError
from nsa_platform.train.task import Task
from nsa_platform.train.validation import Validation, open_validation


class Training:
    """A worker's way through the stages of a run.

    A stage begins as a resumed one does, with a model, an optimizer and a mesh of its own that the
    newest checkpoint fills. So a run that was ended anywhere goes on as the straight one would.
    """

    def __init__(
        self, task: Task, *, world: World, listeners: Listeners, notice: Notice = lambda: None
    ) -> None:
        """notice: why this worker must leave, as Preemption asks for it."""
        first = task.stages[0].train
        self.progress = Progress.from_facts(None, first.guard)
        """As far as the run has come."""
        self._has_trained = False
        self._task = task
        self._world = world
        self._listeners = listeners
        self._preemption = Preemption(world, notice)
        self._checkpoints = CheckpointStore(
            storage.join(task.folder, "checkpoints"),
            config=first.checkpoint,
            world=world,
            say=listeners.say,
            awaited=listeners.awaited,
        )

    @property
    def failed_checkpoints(self) -> list[int]:
        """Steps whose checkpoint could not be written."""
        return self._checkpoints.failed_steps

    def run(self) -> str | None:
        """Train what is left of the run and export the model; why there is none, or None.

        The reason is the same on every worker, and would be again: starting anew is useless.

        Raises:
            TrainingPreempted: a worker must leave and the state is saved; on all workers.
        """
        try:
            tokenizer = Tokenizer(_tokenizer_folder(self._task))
            stage = self._task.stage_at(self._checkpoints.newest_step())
            while stage is not None:
                stage = self._train(stage, tokenizer)
        except (TrainingDiverged, CheckpointError) as error:
            return str(error)
        return None

    def _train(self, stage: Stage, tokenizer: Tokenizer) -> Stage | None:
        """Go through the rest of a stage, after the last one export; returns the stage to go on
        with."""
        task, world = self._task, self._world
        # Also while a stage begins: whoever is told to leave does so after its first step.
        with TERMINATION.heeded():
            forget_earlier_models(stage.train)
            model_config, length = stage.model_of(task.model), stage.data.context_length
            mesh = build_mesh(model_config, stage.train, context_length=length, world=world)
            model, optimizer, facts = self._model(model_config, stage, mesh)
            self.progress = Progress.from_facts(facts, stage.train.guard)
            self.progress.history.add_validations(read_validations(task.folder))
            if task.stage_at(self.progress.step) is not stage:
                # The newest checkpoint cannot be read and the one before it is of another stage.
                return task.stage_at(self.progress.step)
            self._say_where(stage)
            with self._profile(stage, optimizer):
                self._run(stage, model, optimizer, mesh, tokenizer, facts)
            self._has_trained = True
        if stage is not task.stages[-1]:
            if stage.last_step in self._checkpoints.failed_steps:
                raise CheckpointError(
                    f"the checkpoint that stage {stage.number + 2} begins with could not be "
                    "written; the same command trains again from the one before"
                )
            return task.stages[stage.number + 1]
        self._checkpoints.close()
        _choose(stage, self._checkpoints, model, optimizer, self._listeners)
        if stage.train.lora is not None:
            self._save_adapter(stage.train.lora, model)
        target = storage.join(task.folder, "model")
        export(model, target, tokenizer=tokenizer, world=world, say=self._listeners.say)
        return None

    def _model(
        self, config: ModelConfig, stage: Stage, mesh: Mesh
    ) -> tuple[Transformer, torch.optim.Optimizer, dict[str, Any] | None]:
        """Model and optimizer of the newest checkpoint, else of the start; and its facts."""
        task, weights, is_new = self._task, None, not self._checkpoints.has_any()
        # Checkpoints of adapters do not hold the weights that these stand beside.
        if task.start_from is not None and (is_new or stage.train.lora is not None):
            weights = storage.fetch(task.start_from, task.cache_dir)
        model = build_model(config, stage.train, world=self._world, mesh=mesh, weights=weights)
        optimizer = build_optimizer(model, stage.train.optimizer)
        return model, optimizer, self._checkpoints.load(model=model, optimizer=optimizer)

    def _save_adapter(self, lora: LoraConfig, model: Transformer) -> None:
        task = self._task
        about = {
            "base_model": task.start_from,
            "base_digest": task.described[0]["start"],
            **lora.model_dump(mode="json"),
        }
        folder = storage.join(task.folder, "adapter")
        save_adapter(model, folder, about=about, world=self._world, say=self._listeners.say)

    def _profile(
        self, stage: Stage, optimizer: torch.optim.Optimizer
    ) -> AbstractContextManager[None]:
        """Of the first stage that this attempt trains, if a profile is asked for."""
        tracker = self._listeners.tracker
        if not stage.train.profile or self._has_trained or tracker is None:
            return nullcontext()
        return profiled_steps(optimizer, tracker, device=self._world.device)

    def _say_where(self, stage: Stage) -> None:
        """The place from which the run goes on."""
        step, count = self.progress.step, len(self._task.stages)
        if step > stage.first_step or (step and not self._has_trained):
            self._listeners.say(f"goes on from the checkpoint of step {step}")
        if count > 1:
            self._listeners.say(
                f"stage {stage.number + 1} of {count}, steps {stage.first_step + 1} to "
                f"{stage.last_step}: rows of {stage.data.context_length:,} tokens"
            )

    def _run(
        self,
        stage: Stage,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        mesh: Mesh,
        tokenizer: Tokenizer,
        facts: dict[str, Any] | None,
    ) -> None:
        """Train to the end of the stage."""
        task, world, tracker = self._task, self._world, self._listeners.tracker
        progress, state = self.progress, None
        if progress.step > stage.first_step and facts is not None:
            state = LoaderState.from_dict(facts["loader"])
        else:
            progress.guard.forget()
        self._checkpoints.begun = stage.first_step
        loader = _loader(stage, world=world, mesh=mesh, state=state, tracker=tracker)
        described = {"described": task.described[stage.number], "stage": stage.number}
        with closing(loader):
            train(
                model,
                optimizer,
                loader=loader,
                config=stage.train,
                schedule=Schedule(
                    stage.train.optimizer, start=stage.schedule_start, end=stage.schedule_end
                ),
                world=world,
                mesh=mesh,
                progress=progress,
                preemption=self._preemption,
                validation=self._validation(stage, mesh, tokenizer),
                checkpoints=self._checkpoints,
                identity=task.identity | described,
                listeners=self._listeners,
                throughput=throughput_of(stage, model.config, world),
            )

    def _validation(
        self, stage: Stage, mesh: Mesh, tokenizer: Tokenizer
    ) -> Validation | Literal["asynchronous"] | None:
        if not self._task.has_validation[stage.number]:
            return None
        shards = open_split(stage.data, "validation")
        _track_data(shards, self._listeners.tracker, "validation")
        if stage.train.validation == "asynchronous":
            return "asynchronous"
        return open_validation(
            stage, shards, tokenizer, world=self._world, mesh=mesh, say=self._listeners.say
        )


def _choose(
    stage: Stage,
    checkpoints: CheckpointStore,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    listeners: Listeners,
) -> None:
    """Leave the model as it is, or as it was at its best."""
    if stage.train.checkpoint.export == "best":
        facts = checkpoints.load_best(model=model, optimizer=optimizer)
        if facts is None:
            listeners.say(
                f"no checkpoint has {stage.train.checkpoint.best_metric}: the model is that of the "
                "last step"
            )
        else:
            listeners.say(f"the model is that of step {facts['step']}, the best one")


def _tokenizer_folder(task: Task) -> Path:
    return storage.fetch(storage.join(task.stages[0].data.path, "tokenizer"), task.cache_dir)


def _loader(
    stage: Stage, *, world: World, mesh: Mesh, state: LoaderState | None, tracker: Tracker | None
) -> Prefetched:
    shards, more = open_split(stage.data, "train"), open_mixture(stage.data)
    for each in (shards, *more):
        _track_data(each, tracker, "training")
    loader = Loader(
        shards,
        stage.data,
        more=more,
        rank=mesh.data_rank,
        world_size=mesh.data_size,
        rows_per_microbatch=stage.train.sequences_per_microbatch,
        state=state,
    )
    rows_per_step = stage.train.tokens_per_step // stage.data.context_length
    return Prefetched(loader, rows_per_step, pinned=world.device.type == "cuda")


def _track_data(shards: ShardSet, tracker: Tracker | None, context: str) -> None:
    if tracker is not None:
        manifest = shards.manifest.to_dict()
        tracker.log_dataset(manifest, shards.manifest.split, context, source=shards.folder)
