"""Snapshots are whole or absent, survive damage and another number of workers."""

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.distributed.checkpoint.api import CheckpointException

from nsa_platform import storage
from nsa_platform.config.train import CheckpointConfig
from nsa_platform.train.checkpoint import CheckpointStore
from nsa_platform.train.parallel import World
from nsa_platform.train.snapshots import (
    FACTS,
    MARKER,
    CheckpointError,
    newest_facts,
    prune,
    snapshots,
)
from nsa_platform.train.stored_files import storage_is_away
from tests.waiting import eventually

pytestmark = pytest.mark.usefixtures("process_group")

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


class Pair:
    """A model and its optimizer after some steps."""

    def __init__(self, seed: int, width: int = 8) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 8)).square().sum().backward()
        self.optimizer.step()

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten().clone() for p in self.model.parameters()])


def store(
    folder: Path | str,
    lines: list[str] | None = None,
    *,
    world: World = ALONE,
    **config: Any,
) -> CheckpointStore:
    return CheckpointStore(
        str(folder),
        config=CheckpointConfig.model_validate(config),
        world=world,
        say=(lines if lines is not None else []).append,
        retry_delays_s=(0.0,),
    )


def save_steps(folder: Path | str, steps: int, **config: Any) -> tuple[Pair, list[torch.Tensor]]:
    """Snapshots after each of `steps` steps; the weights at each."""
    pair, states = Pair(seed=1), []
    lines: list[str] = []
    checkpoints = store(folder, lines, **config)
    for step in range(1, steps + 1):
        pair.step()
        states.append(pair.weights())
        checkpoints.save(
            step, model=pair.model, optimizer=pair.optimizer, facts={"step": step, "note": "x"}
        )
    checkpoints.close()
    assert (checkpoints.failed_steps, lines) == ([], [])
    return pair, states


def load(folder: Path | str, lines: list[str] | None = None) -> tuple[Pair, dict]:
    pair = Pair(seed=2)
    facts = store(folder, lines).load(model=pair.model, optimizer=pair.optimizer)
    assert facts is not None
    return pair, facts


@pytest.mark.parametrize("asynchronous", [True, False])
def test_training_goes_on_bit_for_bit(tmp_path: Path, asynchronous: bool) -> None:
    straight, _ = save_steps(tmp_path, 2, asynchronous=asynchronous)
    resumed, facts = load(tmp_path)
    assert facts == {"step": 2, "note": "x"}
    assert torch.equal(resumed.weights(), straight.weights())
    random_of_snapshot = torch.get_rng_state()
    for pair in (straight, resumed):
        torch.set_rng_state(random_of_snapshot)
        pair.step()
        pair.step()
    assert torch.equal(resumed.weights(), straight.weights())


def test_random_state_comes_back(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    load(tmp_path)
    first = torch.rand(3)
    load(tmp_path)
    assert torch.equal(torch.rand(3), first)


def test_the_copy_is_taken_before_save_returns(tmp_path: Path) -> None:
    pair, states = save_steps(tmp_path, 1)
    checkpoints = store(tmp_path)
    pair.step()
    expected = pair.weights()
    checkpoints.save(2, model=pair.model, optimizer=pair.optimizer, facts={"step": 2})
    for _ in range(3):
        pair.step()
    checkpoints.close()
    assert torch.equal(load(tmp_path)[0].weights(), expected)
    assert not torch.equal(states[0], expected)


def test_settings_of_the_optimizer_follow_the_configuration(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    pair = Pair(seed=2)
    pair.optimizer.param_groups[0]["lr"] = 0.7
    store(tmp_path).load(model=pair.model, optimizer=pair.optimizer)
    assert pair.optimizer.param_groups[0]["lr"] == 0.7


def test_no_snapshot_is_no_error(tmp_path: Path) -> None:
    pair = Pair(seed=1)
    before = pair.weights()
    assert store(tmp_path / "new").load(model=pair.model, optimizer=pair.optimizer) is None
    assert torch.equal(pair.weights(), before)


def test_keeps_the_newest(tmp_path: Path) -> None:
    save_steps(tmp_path, 5, keep_latest=2)
    assert [each.step for each in snapshots(str(tmp_path))] == [5, 4]
    assert sorted(os.listdir(tmp_path)) == ["step-00000004", "step-00000005"]


def test_pruning_leaves_what_lies_beyond(tmp_path: Path) -> None:
    save_steps(tmp_path, 4, keep_latest=9)
    (tmp_path / "step-00000001.partial").mkdir()
    (tmp_path / "notes").mkdir()
    prune(str(tmp_path), newest=3, config=CheckpointConfig(keep_latest=1))
    assert sorted(os.listdir(tmp_path)) == ["notes", "step-00000003", "step-00000004"]


@pytest.mark.parametrize(
    ("mode", "begun", "kept"),
    [("min", 0, [6, 5, 2]), ("max", 0, [6, 5, 4]), ("min", 2, [6, 5, 3])],
    ids=["lowest", "highest", "of a later stage"],
)
def test_the_best_by_a_metric_stays_beside_the_newest(tmp_path: Path, mode, begun, kept) -> None:
    pair, lines = Pair(seed=1), []
    checkpoints = store(
        tmp_path, lines, keep_latest=2, best_metric="valid/needle_exact", best_mode=mode
    )
    checkpoints.begun = begun
    states = {}
    for step, score in enumerate([3.0, 1.0, 2.0, 5.0, None, math.nan], start=1):
        pair.step()
        states[step] = pair.weights()
        facts = {"step": step, "metrics": {} if score is None else {"valid/needle_exact": score}}
        checkpoints.save(step, model=pair.model, optimizer=pair.optimizer, facts=facts)
    checkpoints.wait()
    assert [each.step for each in snapshots(str(tmp_path))] == kept
    facts = checkpoints.load_best(model=pair.model, optimizer=pair.optimizer)
    assert facts is not None and facts["step"] == kept[-1]
    assert torch.equal(pair.weights(), states[kept[-1]])
    shutil.rmtree(tmp_path / f"step-{kept[-1]:08d}")
    assert checkpoints.load_best(model=pair.model, optimizer=pair.optimizer) is None
    checkpoints.close()
    assert lines == []


def _truncate(folder: Path) -> None:
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def _remove_a_file(folder: Path) -> None:
    (folder / ".metadata").unlink()


def _fill_with_garbage(folder: Path) -> None:
    file = folder / "__0_0.distcp"
    file.write_bytes(b"x" * file.stat().st_size)


def _break_marker(folder: Path) -> None:
    (folder / MARKER).write_text("{")


def _spoil_facts(folder: Path) -> None:
    file = folder / FACTS
    file.write_bytes(b"{" * file.stat().st_size)


def _replace_facts(folder: Path) -> None:
    """JSON of the same size that says nothing."""
    file = folder / FACTS
    file.write_text("1" * file.stat().st_size)


FACT_HARMS = [_spoil_facts, _replace_facts]
HARMS = [_truncate, _remove_a_file, _fill_with_garbage, _break_marker, *FACT_HARMS]


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_newest_is_said_and_the_one_before_taken(tmp_path: Path, harm) -> None:
    _, states = save_steps(tmp_path, 3, keep_latest=2)
    harm(tmp_path / "step-00000003")
    lines: list[str] = []
    pair, facts = load(tmp_path, lines)
    assert facts["step"] == 2
    assert torch.equal(pair.weights(), states[1])
    assert len(lines) == 1
    assert "step-00000003" in lines[0]


def test_only_damaged_ones_are_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    _truncate(tmp_path / "step-00000001")
    pair = Pair(seed=2)
    with pytest.raises(CheckpointError, match="none of the checkpoints can be read"):
        store(tmp_path).load(model=pair.model, optimizer=pair.optimizer)


@pytest.mark.parametrize("harm", FACT_HARMS)
def test_the_newest_step_is_that_of_facts_which_can_be_read(tmp_path: Path, harm) -> None:
    save_steps(tmp_path, 2, keep_latest=2)
    harm(tmp_path / "step-00000002")
    assert store(tmp_path).newest_step() == 1
    harm(tmp_path / "step-00000001")
    assert newest_facts(str(tmp_path)) is None


def test_a_storage_that_fails_is_no_damage(tmp_path: Path, monkeypatch) -> None:
    save_steps(tmp_path, 2, keep_latest=2)

    def away(place: str) -> str:
        if place.endswith(f"step-00000002/{FACTS}"):
            raise storage.StorageError("the storage is away")
        return Path(place).read_text()

    monkeypatch.setattr(storage, "read_text", away)
    with pytest.raises(storage.StorageError, match="is away"):
        newest_facts(str(tmp_path))
    with pytest.raises(storage.StorageError, match="is away"):
        load(tmp_path)
    failures: dict[int, Any] = {1: (storage.StorageError("is away"), None)}
    assert storage_is_away(CheckpointException("read", failures))
    failures[1] = (storage.MissingFileError("no such file"), None)
    assert not storage_is_away(CheckpointException("read", failures))


def test_a_storage_that_is_away_for_a_moment_is_asked_again(tmp_path: Path, monkeypatch) -> None:
    save_steps(tmp_path, 2, keep_latest=2)
    lines: list[str] = []
    checkpoints, list_names, calls = store(tmp_path, lines), storage.list_names, []

    def away_at_first(folder: str) -> list[str]:
        calls.append(folder)
        if len(calls) % 2:
            raise storage.StorageError("the storage is away")
        return list_names(folder)

    monkeypatch.setattr(storage, "list_names", away_at_first)
    assert checkpoints.has_any()
    assert checkpoints.newest_step() == 2
    checkpoints.close()
    assert (
        lines
        == [
            f"reading {tmp_path} failed, next try in 0 s: the storage is away",
        ]
        * 2
    )


def test_a_folder_without_marker_does_not_count(tmp_path: Path) -> None:
    save_steps(tmp_path, 2)
    (tmp_path / "step-00000002" / MARKER).unlink()
    assert load(tmp_path)[1]["step"] == 1


def test_a_failed_write_is_said_and_training_goes_on(tmp_path: Path) -> None:
    lines: list[str] = []
    folder = tmp_path / "file"
    folder.write_text("not a folder")
    pair = Pair(seed=1)
    checkpoints = store(folder, lines)
    checkpoints.save(1, model=pair.model, optimizer=pair.optimizer, facts={})
    checkpoints.wait()
    assert checkpoints.failed_steps == [1]
    assert "step 1 was not written, training goes on" in lines[0]
    folder.unlink()
    checkpoints.save(2, model=pair.model, optimizer=pair.optimizer, facts={})
    checkpoints.close()
    assert checkpoints.failed_steps == [1]
    assert [each.step for each in snapshots(str(folder))] == [2]


def test_only_the_first_worker_makes_the_folder(tmp_path: Path, monkeypatch) -> None:
    """The first clears it beforehand: what another has made would vanish under its hands."""
    second = World(rank=1, size=1, device=torch.device("cpu"))
    seen: list[bool] = []
    for world in (second, ALONE):
        checkpoints, pair = store(tmp_path / "run", world=world), Pair(seed=1)

        def look(place: Path, *_: object) -> None:
            seen.append(place.exists())
            place.mkdir(parents=True, exist_ok=True)

        monkeypatch.setattr(checkpoints, "_write_tensors", look)
        checkpoints.save(1, model=pair.model, optimizer=pair.optimizer, facts={"step": 1})
        checkpoints.close()
    assert seen == [False, True]


def test_an_object_store_that_is_away_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
    }.items():
        monkeypatch.setenv(name, value)
    lines: list[str] = []
    pair = Pair(seed=1)
    checkpoints = store("s3://bucket/run", lines)
    checkpoints.save(1, model=pair.model, optimizer=pair.optimizer, facts={})
    checkpoints.close()
    assert checkpoints.failed_steps == [1]
    assert len(lines) == 2
    assert "failed, next try in 0 s" in lines[0]
    assert "step 1 was not written, training goes on" in lines[1]
    for line in lines:
        assert "http://127.0.0.1:9" in line


@pytest.mark.cluster
def test_an_object_store_keeps_snapshots_like_a_folder(s3_environment) -> None:
    folder = s3_environment.bucket("checkpoints") + "/run"
    _, states = save_steps(folder, 4, keep_latest=2)
    assert [each.step for each in snapshots(folder)] == [4, 3]
    assert storage.list_names(folder) == ["step-00000003", "step-00000004"]
    pair, facts = load(folder)
    assert facts["step"] == 4
    assert torch.equal(pair.weights(), states[3])
    storage.delete_tree(f"{folder}/step-00000004/__0_0.distcp")
    lines: list[str] = []
    assert load(folder, lines)[1]["step"] == 3
    assert "__0_0.distcp is missing" in lines[0]


def _save_until_killed(folder: str) -> None:
    meeting = Path(folder).with_name("group").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    pair = Pair(seed=1, width=8)
    pair.model.append(nn.Linear(2000, 2000))
    pair.optimizer = torch.optim.AdamW(pair.model.parameters(), lr=0.1)
    checkpoints = store(Path(folder), keep_latest=2)
    for step in range(1, 10_000):
        checkpoints.save(step, model=pair.model, optimizer=pair.optimizer, facts={"step": step})


def test_killed_in_the_middle_of_a_write(tmp_path: Path) -> None:
    """Whatever a kill leaves behind, the newest snapshot with a marker is whole."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    process = multiprocessing.get_context("spawn").Process(
        target=_save_until_killed, args=(str(folder),)
    )
    process.start()
    assert process.pid is not None

    def is_writing_another() -> bool:
        is_writing = any(name.endswith(".partial") for name in os.listdir(folder))
        return is_writing and len(snapshots(str(folder))) >= 2

    eventually(is_writing_another, "a write after two snapshots", every_s=0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    found = snapshots(str(folder))
    assert found
    for snapshot in found:
        files = json.loads((Path(snapshot.uri) / MARKER).read_text())["files"]
        assert files
        for name, size in files.items():
            assert (Path(snapshot.uri) / name).stat().st_size == size
