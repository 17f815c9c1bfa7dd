"""Validation apart from the training: the same numbers to the bit, and nothing lost on the way."""

import json
import queue
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nsa_platform import storage
from nsa_platform.config.base import ConfigError
from nsa_platform.config.data import LoaderConfig
from nsa_platform.config.model import ModelConfig
from nsa_platform.config.stages import resolve_stages
from nsa_platform.model.weights import load_model
from nsa_platform.train.listeners import Listeners
from nsa_platform.train.snapshot_validation import read_validations, validate_snapshot
from nsa_platform.train.snapshots import (
    Snapshot,
    awaiting_validation,
    best,
    prune,
    read_facts,
    settle,
    snapshots,
)
from nsa_platform.train.stages import Training
from nsa_platform.train.task import Task
from tests.platform.train.tiny_run import MODEL, Recorded, settings, this_world

pytestmark = pytest.mark.usefixtures("process_group")

DUE = [2, 4, 5]
WAITS = "the best checkpoint is known when all are validated"


def task_of(folder: Path, shards: Path, validation: str, **checkpoint: Any) -> Task:
    """Five steps, validated and saved after each second one."""
    train = settings(
        steps=5,
        tokens_per_step=256,
        validation_tokens=320,
        validate_every_steps=2,
        checkpoint={"every_steps": 2, "keep_latest": 1, **checkpoint},
        samples={"num_prompts": 1, "max_prompt_tokens": 8, "max_new_tokens": 3},
        validation=validation,
    )
    data = LoaderConfig(path=str(shards), context_length=64)
    return Task(
        model=ModelConfig.parse(MODEL.model_dump() | {"vocab_size": 512, "max_context": 64}),
        stages=resolve_stages(data, train, ()),
        cpus=1,
        folder=str(folder),
        start_from=None,
        cache_dir=str(folder / "cache"),
        has_validation=(True,),
        described=({},),
        handle={},
        identity={},
        events=None,
    )


def train(task: Task, recorded: Recorded, **listeners: Any) -> None:
    listeners = {"say": recorded.lines.append} | listeners
    told = Listeners(
        report=lambda step, metrics: recorded.metrics.update({step: dict(metrics)}), **listeners
    )
    assert Training(task, world=this_world(), listeners=told).run() is None


def validated(task: Task, step: int) -> dict[str, float]:
    return validate_snapshot(task, step, world=this_world(), tracker=None, say=print)


def held_out(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if k.startswith(("valid/", "nsa/"))}


def test_a_validation_that_comes_later_finds_the_same(tmp_path: Path, tiny_shards) -> None:
    inline, apart = Recorded(), Recorded()
    task = task_of(tmp_path / "inline", tiny_shards.path, "inline")
    train(task, inline)
    history = read_facts(snapshots(f"{task.folder}/checkpoints")[0])["history"]
    task = task_of(tmp_path / "apart", tiny_shards.path, "asynchronous")
    train(task, apart)
    assert apart.losses() == inline.losses()
    assert not any(held_out(metrics) for metrics in apart.metrics.values())
    # One is kept; the others are still to be read.
    folder = f"{task.folder}/checkpoints"
    assert [each.step for each in awaiting_validation(folder)] == DUE
    # A driver that was killed may begin one again that was as good as done.
    found = {step: validated(task, step) for step in (2, *DUE)}
    assert found == {step: held_out(inline.metrics[step]) for step in DUE}
    kept = json.loads(json.dumps(read_validations(task.folder).to_dict()))
    assert kept == history | {"train": []}
    assert [step for step, _ in kept["samples"]] == DUE
    assert awaiting_validation(folder) == []
    config = task.stages[0].train.checkpoint
    ranked = [each.step for each in best(snapshots(folder), config, 0)]
    assert ranked == sorted(DUE, key=lambda step: found[step]["valid/loss"])
    prune(folder, newest=5, config=config)
    assert {each.step for each in snapshots(folder)} == {5, ranked[0]}


def test_the_best_model_waits_for_its_validation(tmp_path: Path, tiny_shards) -> None:
    inline, apart = Recorded(), Recorded()
    # The first one is the best, and long out of keep_latest when that is known.
    asked = {"export": "best", "best_mode": "max"}
    wanted = task_of(tmp_path / "inline", tiny_shards.path, "inline", **asked)
    train(wanted, inline)
    task = task_of(tmp_path / "apart", tiny_shards.path, "asynchronous", **asked)
    awaited: queue.Queue[int] = queue.Queue()
    is_waited_for = threading.Event()

    def say(line: str) -> None:
        apart.lines.append(line)
        if line == WAITS:
            is_waited_for.set()

    def validate_late() -> None:
        assert is_waited_for.wait(120)
        for _ in DUE:
            validated(task, awaited.get())

    validator = threading.Thread(target=validate_late)
    validator.start()
    train(task, apart, say=say, awaited=awaited.put)
    validator.join()
    assert apart.lines[-1] == inline.lines[-1] == "the model is that of step 2, the best one"
    models = [load_model(Path(each.folder) / "model").state_dict() for each in (wanted, task)]
    assert all(weight.equal(models[1][name]) for name, weight in models[0].items())


def test_a_checkpoint_that_cannot_be_validated_is_let_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        marker = {"step": step, "files": {}, "metrics": {"a": 1.0}, "awaits_validation": True}
        storage.write_text(str(tmp_path / f"step-{step:08d}" / "COMPLETE"), json.dumps(marker))
    first, *others = awaiting_validation(str(tmp_path))
    settle(first, {})
    assert awaiting_validation(str(tmp_path)) == others
    config = settings().checkpoint.model_copy(update={"keep_latest": 1, "keep_best": 0})
    prune(str(tmp_path), newest=3, config=config)
    assert [each.step for each in snapshots(str(tmp_path))] == [3, 2]
    # Nothing comes back of one that is gone.
    settle(replace(first, uri=str(tmp_path / "step-00000001")), {"valid/loss": 1.0})
    assert [each.step for each in snapshots(str(tmp_path))] == [3, 2]
    settle(Snapshot(2, others[0].uri), {"valid/loss": 1.0})
    (found,) = best(snapshots(str(tmp_path)), config, 0)
    assert found.step == 2


def test_only_checkpoints_can_be_validated_apart() -> None:
    with pytest.raises(ConfigError, match=r"validate_every_steps=3 must be a multiple of .*=2"):
        settings(validation="asynchronous", checkpoint={"every_steps": 2})
