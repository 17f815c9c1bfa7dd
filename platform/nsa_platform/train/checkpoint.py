"""Training state to and from storage: sharded, in the background, whole or not at all.

Every worker writes the shards that it holds. Local folders are written under another name and
renamed when they are whole; in an object store each worker writes on its own disk and uploads.
The marker comes last. Loading reads what this worker needs, for any number of workers.
"""

import datetime
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from nsa_platform import storage
from nsa_platform.config.train import CheckpointConfig
from nsa_platform.retry import DELAYS_S, first_line, retried
from nsa_platform.train import random_state
from nsa_platform.train.parallel import World
from nsa_platform.train.snapshots import (
    AWAITS,
    FACTS,
    MARKER,
    CheckpointError,
    Snapshot,
    awaiting_validation,
    best,
    damage,
    marker_text,
    newest_facts,
    prune,
    read_facts,
    snapshot_name,
    snapshots,
)
from nsa_platform.train.state import state_options, state_tensors
from nsa_platform.train.stored_files import storage_is_away, stored_reader

# One worker may retry uploads for long while the others wait for it.
PATIENCE = datetime.timedelta(hours=2)
# How often storage is asked whether validations are done.
POLL_S = 1.0

Value = TypeVar("Value")


class CheckpointStore:
    """The snapshots of one run.

    Every worker holds one and calls `save`, `wait` and `load` at the same points. `say` gets one
    line whenever something happens that a person should know, `awaited` the step of each snapshot
    that is whole and awaits validation; only the first worker's are used.
    The default process group must be initialised, also for one worker.
    """

    def __init__(
        self,
        folder: str,
        *,
        config: CheckpointConfig,
        world: World,
        say: Callable[[str], None],
        awaited: Callable[[int], None] = lambda step: None,
        retry_delays_s: Sequence[float] = DELAYS_S,
    ) -> None:
        self.folder = folder
        self.begun = 0
        """Snapshots up to this step are never among the best: they belong to an earlier stage."""
        self.failed_steps: list[int] = []
        self._config = config
        self._world = world
        self._say = say if world.is_first else _ignore
        self._awaited = awaited
        self._retry_delays_s = tuple(retry_delays_s)
        # Its own group: the background's messages must not mix with the training's.
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[str | None]] | None = None

    def save(
        self,
        step: int,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        facts: dict[str, Any],
    ) -> None:
        """Take a copy of the state and write it; returns when the copy is taken.

        Of the facts `metrics` and `awaits_validation` stand in the snapshot's marker, too.

        The previous snapshot must have been written before the next is taken, so this waits for
        it. A snapshot that cannot be written is said and listed in `failed_steps`; it never stops
        the training.
        """
        self.wait()
        staged = _copied(state_tensors(model, optimizer))
        random = random_state.taken(self._world)
        self._pending = (
            step,
            self._background.submit(self._write, step, staged, random, facts),
        )
        if not self._config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Return when the snapshot that is being written, if any, is whole or has failed."""
        if self._pending is None:
            return
        step, future = self._pending
        self._pending = None
        problem = future.result()
        if problem is not None:
            self.failed_steps.append(step)
            self._say(f"checkpoint of step {step} was not written, training goes on: {problem}")

    def close(self) -> None:
        """Wait for the last snapshot and stop the background thread."""
        self.wait()
        self._background.shutdown()

    def load(self, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Fill model, optimizer and random state from the newest snapshot that is whole.

        Returns its facts, or None if the run has no snapshot yet. A damaged one is said in one
        line and the one before it is taken.

        Raises:
            CheckpointError: there are snapshots and none can be read.
            StorageError: the storage cannot be reached.
        """
        found = self._from_first(self._whole_snapshots)
        facts = self._load_first(found, model=model, optimizer=optimizer)
        if facts is None and self.has_any():
            raise CheckpointError(
                f"{self.folder}: none of the checkpoints can be read; to start again from step 0, "
                "move the folder away or choose another name"
            )
        return facts

    def load_best(
        self, *, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> dict[str, Any] | None:
        """Fill model and optimizer from the best snapshot by best_metric, when none awaits its
        validation any more.

        Returns its facts, or None if no snapshot with that metric can be read.

        Raises:
            StorageError: the storage cannot be reached.
        """
        if self._from_first(self._is_waited_for):
            self._say("the best checkpoint is known when all are validated")
            while self._from_first(self._is_waited_for):
                time.sleep(POLL_S)
        found = self._from_first(lambda: best(self._whole_snapshots(), self._config, self.begun))
        return self._load_first(found, model=model, optimizer=optimizer)

    def _is_waited_for(self) -> bool:
        return bool(awaiting_validation(self.folder))

    def _load_first(
        self, found: list[Snapshot], *, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> dict[str, Any] | None:
        """The first snapshot that can be read."""
        for snapshot in found:
            try:
                return self._load(snapshot, model=model, optimizer=optimizer)
            # Reading damaged files fails in as many ways as there are formats inside them.
            except (Exception, CheckpointException) as error:
                if storage_is_away(error):
                    raise
                self._say(f"checkpoint {snapshot.name} cannot be read: {_reason(error)}")
        return None

    def has_any(self) -> bool:
        """Whether the run has a snapshot, be it whole or damaged. Every worker calls it."""
        return self._from_first(lambda: bool(snapshots(self.folder)))

    def newest_step(self) -> int:
        """Step of the newest snapshot whose files are all there, or 0. Every worker calls it."""
        facts = self._from_first(lambda: newest_facts(self.folder))
        return 0 if facts is None else facts["step"]

    def _whole_snapshots(self) -> list[Snapshot]:
        whole = []
        for snapshot in snapshots(self.folder):
            problem = damage(snapshot)
            if problem is None:
                whole.append(snapshot)
            else:
                self._say(f"checkpoint {snapshot.name} is damaged: {problem}")
        return whole

    def _load(
        self, snapshot: Snapshot, *, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:
        tensors = state_tensors(model, optimizer)
        load(
            tensors,
            storage_reader=stored_reader(snapshot.uri),
            process_group=self._group,
        )
        _, optimizer_state = get_state_dict(model, optimizer)
        optimizer_state["state"] = tensors["optimizer"]
        set_state_dict(
            model,
            optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=optimizer_state,
            options=state_options(model),
        )
        random_state.restore(snapshot.uri, self._world)
        return self._from_first(lambda: read_facts(snapshot))

    def _write(
        self, step: int, tensors: Any, random: dict[str, Tensor], facts: dict[str, Any]
    ) -> str | None:
        """Write one snapshot. Returns why it failed, on every worker the same, or None."""
        target = storage.join(self.folder, snapshot_name(step))
        remote = storage.is_remote(target)
        place = (
            Path(tempfile.mkdtemp(prefix="checkpoint-")) if remote else Path(target + ".partial")
        )
        try:
            return (
                self._agree(lambda: self._prepare(target, place))
                or self._agree(lambda: self._write_tensors(place, tensors, random))
                or self._agree(lambda: self._write_facts(place, facts))
                or self._agree(lambda: self._upload(place, target))
                or self._commit(step, place, target, facts=facts)
            )
        finally:
            if remote:
                shutil.rmtree(place, ignore_errors=True)

    def _prepare(self, target: str, place: Path) -> None:
        """Leave nothing of an earlier attempt. The others must not make the folder meanwhile."""
        if not self._world.is_first:
            return
        shutil.rmtree(place, ignore_errors=True)
        if storage.is_remote(target):
            self._insist(lambda: storage.delete_tree(target), target)
        place.mkdir(parents=True, exist_ok=True)

    def _write_tensors(self, place: Path, tensors: Any, random: dict[str, Tensor]) -> None:
        save(
            tensors,
            storage_writer=FileSystemWriter(place),
            process_group=self._group,
        )
        torch.save(random, place / random_state.file_name(self._world.rank))

    def _write_facts(self, place: Path, facts: dict[str, Any]) -> None:
        if self._world.is_first:
            storage.write_bytes(str(place / FACTS), _json_bytes(facts))

    def _upload(self, place: Path, target: str) -> None:
        if storage.is_remote(target):
            self._insist(lambda: storage.upload_tree(place, target), target)

    def _insist(self, action: Callable[[], None], target: str) -> None:
        """Do something with the remote target, again if it fails."""
        what = f"writing checkpoint {target}"
        retried(action, what, say=self._say, delays_s=self._retry_delays_s)

    def _insisted(self, question: Callable[[], Value]) -> Value:
        """The answer, after a wait where the storage does not give one."""
        answers: list[Value] = []
        retried(
            lambda: answers.append(question()),
            f"reading {self.folder}",
            say=self._say,
            delays_s=self._retry_delays_s,
            final=(storage.MissingFileError,),
        )
        return answers[0]

    def _commit(
        self, step: int, place: Path, target: str, *, facts: Mapping[str, Any]
    ) -> str | None:
        """Put the marker, make the folder visible, delete old snapshots: on the first worker."""
        own = {path.name: path.stat().st_size for path in place.iterdir() if path.is_file()}
        files = {name: size for part in self._gather(own) for name, size in part.items()}
        awaits_validation = facts.get(AWAITS, False)

        def commit() -> None:
            if not self._world.is_first:
                return
            metrics = facts.get("metrics", {})
            marker = marker_text(step, files, metrics, awaits_validation=awaits_validation)
            if storage.is_remote(target):
                place_of_marker = storage.join(target, MARKER)
                self._insist(lambda: storage.write_bytes(place_of_marker, marker), target)
            else:
                _need_all(place, files)
                storage.write_bytes(str(place / MARKER), marker)
                shutil.rmtree(target, ignore_errors=True)
                os.rename(place, target)

        problem = self._agree(commit)
        if problem is None and self._world.is_first:
            if awaits_validation:
                self._awaited(step)
            self._prune(step)
        return problem

    def _prune(self, step: int) -> None:
        """Old snapshots that cannot be deleted now are deleted after the next one."""
        try:
            prune(self.folder, newest=step, since=self.begun, config=self._config)
        except OSError as error:
            self._say(f"old checkpoints were not deleted: {_reason(error)}")

    def _agree(self, work: Callable[[], None]) -> str | None:
        """Do the work on every worker. The first failure among them, or None, for all of them."""
        problem = None
        try:
            work()
        # Whatever stops one worker's writing is told to all; it must not end the training.
        except (Exception, CheckpointException) as error:
            problem = f"worker {self._world.rank}: {_reason(error)}"
        return next((each for each in self._gather(problem) if each is not None), None)

    def _gather(self, value: Value) -> list[Value]:
        """This value of every worker."""
        gathered: list[Any] = [None] * self._world.size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def _from_first(self, question: Callable[[], Value]) -> Value:
        """Ask on the first worker, again where the storage is away; the answer, or the exception,
        on all."""
        answer: Any = None
        if self._world.is_first:
            try:
                answer = self._insisted(question)
            except (OSError, CheckpointError) as error:
                answer = error
        box = [answer]
        dist.broadcast_object_list(box, src=0, group=self._group)
        answer = box[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def _copied(tensors: dict[str, Any]) -> Any:
    """The same tree with tensors on the CPU that training does not change.

    A stager for each snapshot: kept for a second one, torch 2.11's fails on sharded tensors.
    """
    stager = DefaultStager(StagingOptions(False, False, False, False))
    try:
        return stager.stage(tensors)
    finally:
        stager.close()


def _need_all(place: Path, files: dict[str, int]) -> None:
    for name, size in files.items():
        path = place / name
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(
                f"{path} is not visible to the first worker; a local storage folder must be on a "
                "file system that all nodes share, otherwise use s3://"
            )


def _json_bytes(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts, indent=1, sort_keys=True).encode()


def _reason(error: BaseException) -> str:
    """The first worker's own reason, where several workers' reasons have been put together."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return first_line(error)


def _ignore(line: str) -> None:
    """Workers but the first say nothing."""
