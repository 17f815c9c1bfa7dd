"""Validations beside a training that does not wait: what they keep on disk stays bounded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import validations
from jobs.attempt import Attempt
from jobs.validations import Validations
from nsa_platform.config.mesh import MeshConfig
from nsa_platform.config.train import CheckpointConfig, ClusterConfig
from nsa_platform.train.snapshots import (
    MARKER,
    Snapshot,
    awaiting_validation,
    marker_text,
    prune,
    settle,
    snapshot_name,
    snapshots,
)

EVENTS = st.lists(st.sampled_from(["checkpoint", "plain checkpoint", "validated"]), max_size=30)


class Training:
    """A run that writes checkpoints, and the task that validates them, both only when told to."""

    def __init__(self, folder: Path, config: CheckpointConfig, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.config, self.step = folder / "checkpoints", config, 0
        self.folder.mkdir(parents=True)
        self.running: int | None = None
        self.is_done = False
        self.validated: list[int] = []
        self.lines: list[str] = []
        self.awaited: list[int] = []
        # Ray's part: a task that has begun is done when the test says so.
        patch.setattr(validations, "_validation", lambda _: SimpleNamespace(remote=self._begin))
        patch.setattr(
            validations.ray, "wait", lambda refs, timeout: (refs if self.is_done else [],)
        )
        patch.setattr(validations.ray, "get", lambda step: self._end(step))
        stage = SimpleNamespace(train=SimpleNamespace(checkpoint=config, mesh=MeshConfig()))
        task = SimpleNamespace(folder=str(folder), stages=[stage], stage_at=lambda step: stage)
        attempt = SimpleNamespace(
            run=SimpleNamespace(cluster=ClusterConfig()),
            task=lambda events: task,
            inputs=SimpleNamespace(facts=None),
        )
        self.validations = Validations(
            [cast(Attempt, attempt)],
            say=self.lines.append,
            validated=lambda step, metrics: self.validated.append(step),
        )

    def _begin(self, task: Any, step: int, probed: int) -> int:
        self.running, self.is_done = step, False
        return step

    def _end(self, step: int) -> tuple[dict[str, float], list[str]]:
        metrics = {"valid/loss": float(step % 3)}
        settle(Snapshot(step, str(self.folder / snapshot_name(step))), metrics)
        self.running, self.is_done = None, False
        return metrics, []

    def checkpoint(self, awaits: bool) -> None:
        self.step += 1
        place = self.folder / snapshot_name(self.step)
        place.mkdir()
        content = marker_text(self.step, {}, {}, awaits_validation=awaits)
        (place / MARKER).write_bytes(content)
        prune(str(self.folder), newest=self.step, config=self.config)
        if awaits:
            self.awaited.append(self.step)
            self.validations.look(0)

    def finish(self) -> None:
        self.validations.poll()
        while self.running is not None:
            self.is_done = True
            self.validations.poll()

    def left_out(self) -> list[int]:
        said = [line.partition("left out that of step ")[2] for line in self.lines]
        return [int(step) for line in said for step in line.split(", ")]


@given(events=EVENTS, keep_latest=st.integers(1, 3), export=st.sampled_from(["last", "best"]))
@settings(max_examples=60, deadline=None)
def test_checkpoints_that_wait_are_bounded_and_the_newest_is_validated(
    events: list[str], keep_latest: int, export: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = CheckpointConfig(keep_latest=keep_latest, keep_best=1, export=export)
    with pytest.MonkeyPatch.context() as patch:
        training = Training(tmp_path_factory.mktemp("run"), config, patch)
        for event in events:
            if event == "validated":
                training.is_done = training.running is not None
            else:
                training.checkpoint(event == "checkpoint")
            training.validations.poll()
            waiting = [each.step for each in awaiting_validation(str(training.folder))]
            if export == "last":
                assert len(waiting) <= keep_latest + 1
                # One more best one may be there until the next checkpoint is written.
                assert len(snapshots(str(training.folder))) <= 2 * keep_latest + 4
            if training.awaited and training.awaited[-1] not in training.validated:
                assert training.awaited[-1] in waiting
        training.finish()
    assert sorted(training.validated + training.left_out()) == training.awaited
    assert training.validated == sorted(training.validated)
    assert training.awaited[-1:] == training.validated[-1:]
    if export == "best":
        assert training.lines == []


def test_what_is_left_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path, CheckpointConfig(keep_latest=2), monkeypatch)
    for _ in range(6):
        training.checkpoint(awaits=True)
        training.validations.poll()
    assert training.running == 1
    line = "validations take longer than training: left out that of step"
    assert training.lines == [f"{line} 2", f"{line} 3", f"{line} 4"]
    assert [each.step for each in snapshots(str(training.folder))] == [6, 5, 4, 1]
    training.finish()
    assert training.validated == [1, 5, 6]
