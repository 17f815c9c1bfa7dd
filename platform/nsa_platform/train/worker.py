"""What Ray Train runs on each worker: put the run's parts together, train, export."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train.v2._internal.execution.context import get_train_context

from nsa_platform import storage
from nsa_platform.data.loader import Loader, LoaderState
from nsa_platform.data.manifest import ShardError
from nsa_platform.data.prefetch import Prefetched
from nsa_platform.data.shards import ShardSet, open_mixture, open_split
from nsa_platform.data.tokenizer import Tokenizer, TokenizerError
from nsa_platform.model.cost import dense_equivalent
from nsa_platform.model.transformer import Transformer
from nsa_platform.model.weights import ExportError
from nsa_platform.tracking import RunHandle, SystemMonitor, Tracker
from nsa_platform.train.adapters import save_adapter, training_flops
from nsa_platform.train.build import build_mesh, build_model
from nsa_platform.train.checkpoint import CheckpointStore
from nsa_platform.train.export import export
from nsa_platform.train.guard import TrainingDiverged
from nsa_platform.train.listeners import Listeners, Metrics
from nsa_platform.train.loop import train
from nsa_platform.train.mesh import Mesh
from nsa_platform.train.metrics import Throughput, device_name, peak_flops
from nsa_platform.train.notice import TERMINATION
from nsa_platform.train.optimizer import build_optimizer
from nsa_platform.train.parallel import World
from nsa_platform.train.preemption import Preemption
from nsa_platform.train.profiling import profile_steps
from nsa_platform.train.progress import Progress
from nsa_platform.train.samples import Samples
from nsa_platform.train.snapshots import CheckpointError
from nsa_platform.train.task import Events, Outcome, Task
from nsa_platform.train.validation import Validation

# The driver is told at most this often; its line of progress needs no more.
REPORT_EVERY_S = 0.2

# Broken files: perhaps seen by one worker alone, and again by whoever takes its place.
HOPELESS = (ShardError, TokenizerError, ExportError)


class Voice:
    """Tells the driver, from the first worker, and Ray Train, from all of them."""

    def __init__(self, world: World, events: Events | None, *, steps: int) -> None:
        self.metrics: dict[str, float] = {}
        self._all_events = events
        self._events = events if world.is_first else None
        self._steps = steps
        self._told_s = 0.0

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


def train_worker(config: dict[str, Any]) -> Outcome:
    """Train one run, or go on with it, on this worker. `config` holds the Task as `task`."""
    task: Task = config["task"]
    context = ray.train.get_context()
    world = World(
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        device=ray.train.torch.get_device(),
    )
    if world.device.type == "cpu":
        torch.set_num_threads(task.cpus)
    else:
        torch.cuda.set_device(world.device)
    voice = Voice(world, task.events, steps=task.train.steps)
    with ExitStack() as stack:
        stack.enter_context(_warnings_told(voice))
        tracker = None
        if context.get_local_rank() == 0:
            tracker = Tracker(RunHandle.from_dict(task.handle), creates_run=world.is_first)
            # What has not arrived is told by the driver, which delivers last.
            stack.callback(tracker.finish, None, report=False)
            stack.callback(SystemMonitor(tracker).stop)
        try:
            return _train(
                task, world=world, voice=voice, tracker=tracker if world.is_first else None
            )
        except HOPELESS as error:
            voice.give_up(f"worker {world.rank}: {error}")
            raise


def _train(task: Task, *, world: World, voice: Voice, tracker: Tracker | None) -> Outcome:
    checkpoints = CheckpointStore(
        storage.join(task.folder, "checkpoints"),
        config=task.train.checkpoint,
        world=world,
        say=voice.say,
    )
    progress = Progress.from_facts(None, task.train.guard)
    try:
        tokenizer = Tokenizer(_tokenizer_folder(task))
        length = task.data.context_length
        mesh = build_mesh(task.model, task.train, context_length=length, world=world)
        model, optimizer, facts = _model(task, world=world, mesh=mesh, checkpoints=checkpoints)
        if task.train.profile and tracker is not None:
            profile_steps(optimizer, tracker, device=world.device)
        progress = Progress.from_facts(facts, task.train.guard)
        if facts is not None:
            voice.say(f"goes on from the checkpoint of step {progress.step}")
        state = None if facts is None else LoaderState.from_dict(facts["loader"])
        loader = _loader(task, world=world, mesh=mesh, state=state, tracker=tracker)
        with closing(loader), TERMINATION.heeded():
            train(
                model,
                optimizer,
                loader=loader,
                config=task.train,
                world=world,
                mesh=mesh,
                progress=progress,
                preemption=Preemption(world, _notice),
                validation=_validation(task, voice, tokenizer, tracker, world=world, mesh=mesh),
                checkpoints=checkpoints,
                identity=task.identity,
                listeners=Listeners(voice.report, voice.say, tracker),
                throughput=_throughput(task, world),
            )
        checkpoints.close()
        _choose(task, checkpoints, model, optimizer, voice)
        if task.train.lora is not None:
            _save_adapter(task, model, world=world, voice=voice)
        target = storage.join(task.folder, "model")
        export(model, target, tokenizer=tokenizer, world=world, say=voice.say)
        problem = None
    # The same on every worker and again the same if tried again: Ray is not asked to restart.
    except (TrainingDiverged, CheckpointError) as error:
        problem = str(error)
    losses = progress.history.train
    return Outcome(
        step=progress.step,
        device=device_name(world.device),
        first_loss=losses[0][1] if losses else None,
        last_loss=losses[-1][1] if losses else None,
        metrics=voice.metrics,
        failed_checkpoints=checkpoints.failed_steps,
        problem=problem,
    )


def _choose(
    task: Task,
    checkpoints: CheckpointStore,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    voice: Voice,
) -> None:
    """Leave the model as it is, or as it was at its best."""
    if task.train.checkpoint.export == "best":
        facts = checkpoints.load_best(model=model, optimizer=optimizer)
        if facts is not None:
            voice.say(f"the model is that of step {facts['step']}, the best one")


def _save_adapter(task: Task, model: Transformer, *, world: World, voice: Voice) -> None:
    assert task.train.lora is not None
    about = {
        "base_model": task.start_from,
        "base_digest": task.identity["described"]["start"],
        **task.train.lora.model_dump(mode="json"),
    }
    folder = storage.join(task.folder, "adapter")
    save_adapter(model, folder, about=about, world=world, say=voice.say)


def _notice() -> str | None:
    """Why this worker must leave: it was told to end, or its node is being drained."""
    info = get_train_context().preemption_context.preemption_info
    rank = ray.train.get_context().get_world_rank()
    if info is not None and rank in info.preempted_ranks:
        return "its node is being taken away"
    return TERMINATION()


def _model(
    task: Task, *, world: World, mesh: Mesh, checkpoints: CheckpointStore
) -> tuple[Transformer, torch.optim.Optimizer, dict[str, Any] | None]:
    """Model and optimizer of the newest checkpoint, else of the start; and its facts."""
    weights, is_new = None, not checkpoints.has_any()
    # Checkpoints of adapters do not hold the weights that these stand beside.
    if task.start_from is not None and (is_new or task.train.lora is not None):
        weights = storage.fetch(task.start_from, task.cache_dir)
    model = build_model(task.model, task.train, world=world, mesh=mesh, weights=weights)
    optimizer = build_optimizer(model, task.train.optimizer)
    return model, optimizer, checkpoints.load(model=model, optimizer=optimizer)


def _tokenizer_folder(task: Task) -> Path:
    return storage.fetch(storage.join(task.data.path, "tokenizer"), task.cache_dir)


def _loader(
    task: Task, *, world: World, mesh: Mesh, state: LoaderState | None, tracker: Tracker | None
) -> Prefetched:
    shards, more = open_split(task.data, "train"), open_mixture(task.data)
    for each in (shards, *more):
        _track_data(each, tracker, "training")
    loader = Loader(
        shards,
        task.data,
        more=more,
        rank=mesh.data_rank,
        world_size=mesh.data_size,
        rows_per_microbatch=task.train.sequences_per_microbatch,
        state=state,
    )
    rows_per_step = task.train.tokens_per_step // task.data.context_length
    return Prefetched(loader, rows_per_step, pinned=world.device.type == "cuda")


def _validation(
    task: Task,
    voice: Voice,
    tokenizer: Tokenizer,
    tracker: Tracker | None,
    *,
    world: World,
    mesh: Mesh,
) -> Validation | None:
    if not task.has_validation:
        return None
    shards = open_split(task.data, "validation")
    _track_data(shards, tracker, "validation")
    try:
        token_bytes = torch.from_numpy(tokenizer.token_bytes())
    except TokenizerError:
        # Ids of such a tokenizer have no bytes of their own; there is a loss in nats alone.
        token_bytes = None
    samples = None
    if task.train.samples.num_prompts:
        samples = Samples(shards, tokenizer, task.train.samples, world=world, mesh=mesh)
        if len(samples) < task.train.samples.num_prompts:
            longest = task.train.samples.max_prompt_tokens
            voice.say(f"samples: {len(samples)} held-out prompts of at most {longest} tokens")
    return Validation(
        shards,
        task.data,
        tokens=task.train.validation_tokens,
        rows_per_microbatch=task.train.sequences_per_microbatch,
        world=world,
        mesh=mesh,
        token_bytes=token_bytes,
        samples=samples,
    )


def _track_data(shards: ShardSet, tracker: Tracker | None, context: str) -> None:
    if tracker is not None:
        manifest = shards.manifest.to_dict()
        tracker.log_dataset(manifest, shards.manifest.split, context, source=shards.folder)


def _throughput(task: Task, world: World) -> Throughput:
    peak = peak_flops(world.device) if task.train.dtype == "bfloat16" else None
    length, lora = task.data.context_length, task.train.lora
    return Throughput(
        tokens_per_step=task.train.tokens_per_step,
        flops_per_token=training_flops(task.model, lora, length),
        peak=None if peak is None else peak * world.size,
        dense_flops_per_token=training_flops(dense_equivalent(task.model), lora, length),
        workers=world.size,
    )


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
