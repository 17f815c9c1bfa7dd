"""A run in stages: what goes on from one to the next, wherever it is ended on the way."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nsa_platform.config.data import LoaderConfig
from nsa_platform.config.model import ModelConfig
from nsa_platform.config.stages import StageConfig, resolve_stages
from nsa_platform.model.weights import load_config
from nsa_platform.train.listeners import Listeners
from nsa_platform.train.preemption import TrainingPreempted
from nsa_platform.train.schedule import learning_rate
from nsa_platform.train.snapshots import read_facts, snapshots
from nsa_platform.train.stages import Training
from nsa_platform.train.task import Task
from tests.platform.train.tiny_run import MODEL, Recorded, settings, this_world
from tests.platform.train.workers import group_of_one

pytestmark = pytest.mark.usefixtures("process_group")

ENDS = (4, 7, 9)
YARN = {"factor": 2, "original_context": 64}
STAGES = [
    {"steps": 3, "context_length": 64, "learning_rate": 4e-3, "warmup_steps": 1},
    {"steps": 2, "context_length": 128, "yarn": YARN, "sequences_per_microbatch": 2},
]


@dataclass(frozen=True)
class Straight:
    """An unbroken run."""

    task: Task
    recorded: Recorded
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_shards) -> Straight:
    """Three stages of 4, 3 and 2 steps with rows of 32, 64 and 128 tokens."""
    train = settings(
        steps=4,
        tokens_per_step=256,
        validation_tokens=256,
        checkpoint={"every_steps": 2, "keep_latest": 4},
    )
    later = [StageConfig.parse(stage) for stage in STAGES]
    data = LoaderConfig(path=str(tiny_shards.path), context_length=32)
    folder = tmp_path_factory.mktemp("straight")
    task = Task(
        model=ModelConfig.parse(MODEL.model_dump() | {"vocab_size": 512}),
        stages=resolve_stages(data, train, later),
        cpus=1,
        folder=str(folder),
        start_from=None,
        cache_dir=str(folder / "cache"),
        has_validation=(True, True, False),
        described=({"of": 0}, {"of": 1}, {"of": 2}),
        handle={},
        identity={"name": "run"},
        events=None,
    )
    recorded = Recorded()
    with group_of_one(tmp_path_factory.mktemp("group")):
        assert attempt(task, recorded) is None
    return Straight(task, recorded, load_file(folder / "model" / "model.safetensors"))


@pytest.fixture
def task(straight: Straight, tmp_path: Path) -> Task:
    """The same run in a folder of its own."""
    return replace(straight.task, folder=str(tmp_path))


def attempt(task: Task, recorded: Recorded, *, leaves_at: int | None = None) -> str | None:
    """Train until the run is over or has done `leaves_at` steps, as a worker does."""
    listeners = Listeners(
        report=lambda step, metrics: recorded.metrics.update({step: dict(metrics)}),
        say=recorded.lines.append,
    )

    def notice() -> str | None:
        return "told" if training.progress.step == leaves_at else None

    training = Training(task, world=this_world(), listeners=listeners, notice=notice)
    if leaves_at is None:
        return training.run()
    with pytest.raises(TrainingPreempted):
        training.run()
    return None


def same(task: Task, recorded: Recorded, straight: Straight) -> bool:
    """Whether a run that was broken has come to what an unbroken one comes to, to the bit."""
    found = load_file(f"{task.folder}/model/model.safetensors")
    return recorded.losses() == straight.recorded.losses() and all(
        found[name].equal(weights) for name, weights in straight.weights.items()
    )


def test_a_run_ended_in_every_stage_and_between_them(task: Task, straight: Straight) -> None:
    recorded = Recorded()
    for step in (1, 5, 8):
        attempt(task, recorded, leaves_at=step)
    # The end of a stage is no moment to leave: its checkpoint is there, the next one begins.
    newest = snapshots(f"{task.folder}/checkpoints")[0]
    assert read_facts(newest)["stage"] == 2
    assert read_facts(newest)["described"] == {"of": 2}
    assert attempt(task, recorded) is None
    assert sorted(recorded.metrics) == list(range(1, ENDS[-1] + 1))
    assert same(task, recorded, straight)
    assert [line for line in recorded.lines if line.startswith("stage 3 ")] == [
        "stage 3 of 3, steps 8 to 9: rows of 128 tokens"
    ] * 2


def test_what_each_stage_has_of_its_own(straight: Straight) -> None:
    recorded, task = straight.recorded, straight.task
    optimizer = task.stages[0].train.optimizer
    rates = [recorded.metrics[step]["train/lr"] for step in range(1, 10)]
    assert rates[:4] == [learning_rate(step, config=optimizer, steps=4) for step in range(4)]
    later = optimizer.model_copy(update={"learning_rate": 4e-3, "warmup_steps": 1})
    assert rates[4:] == [learning_rate(step, config=later, steps=5) for step in range(5)]
    lengths = [recorded.metrics[step]["train/context_length"] for step in range(1, 10)]
    assert lengths == [32] * 4 + [64] * 3 + [128] * 2
    assert [recorded.metrics[step]["train/tokens"] for step in ENDS] == [256 * n for n in ENDS]
    exported = load_config(Path(f"{task.folder}/model"))
    assert exported.max_context == 128
    assert exported.yarn is not None and exported.yarn.factor == 2
    assert exported.model_copy(update={"yarn": None, "max_context": 48}) == task.model
    validated = [step for step in range(1, 10) if "valid/loss" in recorded.metrics[step]]
    assert validated == [3, 4, 6, 7]


def test_broken_checkpoints_lead_back_into_the_stage_before(task: Task, straight: Straight) -> None:
    recorded = Recorded()
    attempt(task, recorded, leaves_at=5)
    for snapshot in snapshots(f"{task.folder}/checkpoints")[:2]:
        assert snapshot.step in (5, 4)
        for path in Path(snapshot.uri).glob("*.distcp"):
            path.write_bytes(b"x" * path.stat().st_size)
    assert attempt(task, recorded) is None
    assert "goes on from the checkpoint of step 2" in recorded.lines
    assert same(task, recorded, straight)


def test_a_run_that_goes_on_where_a_stage_begins_says_so(task: Task) -> None:
    recorded = Recorded()
    attempt(task, recorded, leaves_at=5)
    assert not [line for line in recorded.lines if line.startswith("goes on")]
    shutil.rmtree(f"{task.folder}/checkpoints/step-00000005")
    attempt(task, recorded, leaves_at=6)
    assert "goes on from the checkpoint of step 4" in recorded.lines


def test_a_stage_needs_the_checkpoint_of_the_one_before(task: Task, straight: Straight) -> None:
    recorded, checkpoints = Recorded(), Path(task.folder) / "checkpoints"
    checkpoints.mkdir(parents=True)
    in_the_way = checkpoints / "step-00000004.partial"
    in_the_way.touch()
    problem = attempt(task, recorded)
    assert problem and "the checkpoint that stage 2 begins with could not be written" in problem
    assert max(recorded.metrics) == 4
    in_the_way.unlink()
    assert attempt(task, recorded) is None
    assert same(task, recorded, straight)
