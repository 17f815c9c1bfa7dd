"""Validate a checkpoint apart from the training that has written it and goes on."""

import json
from collections.abc import Callable

from nsa_platform import storage
from nsa_platform.config.mesh import MeshConfig
from nsa_platform.data.shards import open_split
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.tracking import Tracker
from nsa_platform.train.build import build_mesh, build_model
from nsa_platform.train.history import History
from nsa_platform.train.parallel import World
from nsa_platform.train.progress import Progress
from nsa_platform.train.snapshots import Snapshot, read_facts, settle, snapshot_name
from nsa_platform.train.state import fill_weights
from nsa_platform.train.task import Task
from nsa_platform.train.validating import validate
from nsa_platform.train.validation import open_validation

RECORD = "validations.json"


def validate_snapshot(
    task: Task,
    step: int,
    *,
    world: World,
    tracker: Tracker | None,
    say: Callable[[str], None],
    probed: int = 1,
) -> dict[str, float]:
    """Validate the snapshot of a step, record its metrics and draw the run so far.

    What is found goes to the tracker, then into validations.json, at last into the snapshot's
    marker: a validation that dies on the way is done again and doubles nothing. Only one may be at
    work on a run.

    Args:
        world: of one worker, in an initialised default process group of its own.
        probed: microbatches that tell of the attention's health, as Validation takes it.

    Raises:
        OSError, and whatever reading a damaged snapshot raises.
    """
    uri = storage.join(task.folder, "checkpoints", snapshot_name(step))
    snapshot = Snapshot(step, uri)
    facts = read_facts(snapshot)
    stage = task.stages[facts["stage"]]
    config, length = stage.model_of(task.model), stage.data.context_length
    train = stage.train.model_copy(update={"mesh": MeshConfig()})
    mesh = build_mesh(config, train, context_length=length, world=world)
    weights = None
    if task.start_from is not None and train.lora is not None:
        weights = storage.fetch(task.start_from, task.cache_dir)
    model = build_model(config, train, world=world, mesh=mesh, weights=weights)
    fill_weights(model, uri)
    tokenizer = Tokenizer(
        storage.fetch(storage.join(task.stages[0].data.path, "tokenizer"), task.cache_dir)
    )
    shards = open_split(stage.data, "validation")
    validation = open_validation(
        stage, shards, tokenizer, world=world, mesh=mesh, say=say, probed=probed
    )
    progress = Progress.from_facts(facts, train.guard)
    progress.history.add_validations(read_validations(task.folder))
    metrics = validate(model, validation, progress, tracker)
    if tracker is not None:
        tracker.log_metrics(metrics, step)
    progress.history.train.clear()
    record = json.dumps(progress.history.to_dict())
    storage.write_text(storage.join(task.folder, RECORD), record)
    settle(snapshot, metrics)
    return metrics


def read_validations(folder: str) -> History:
    """What the validations of a run's checkpoints have found so far; of the training nothing.

    Raises:
        StorageError: the storage cannot be reached.
    """
    place = storage.join(folder, RECORD)
    if not storage.exists(place):
        return History()
    return History.from_dict(json.loads(storage.read_text(place)))
