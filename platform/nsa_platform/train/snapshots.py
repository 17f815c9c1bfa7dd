"""Checkpoint folders: their names, the marker that vouches for them, which are whole, which go.

    <run>/checkpoints/step-00000100/     one snapshot
        COMPLETE                         written last: {"step": 100, "files": {name: bytes},
                                         "metrics": {name: value}}; while a validation has still
                                         to read it, also "awaits_validation": true
        state.json                       facts: step, tokens, loader, MLflow run, configuration
        .metadata  __0_0.distcp ...      tensors, by torch.distributed.checkpoint
        rng-00000.pt ...                 random state of each worker
    <run>/checkpoints/step-00000200.partial/   being written (local folders only)

A folder without COMPLETE does not count, whatever it holds.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from nsa_platform import storage
from nsa_platform.config.train import CheckpointConfig

MARKER = "COMPLETE"
FACTS = "state.json"
AWAITS = "awaits_validation"

_NAME = re.compile(r"step-(\d{8,})$")
_ANY_NAME = re.compile(r"step-(\d{8,})(\.partial)?$")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written. The message names it and says what to do."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A checkpoint that has its marker."""

    step: int
    uri: str

    @property
    def name(self) -> str:
        """Name of its folder."""
        return snapshot_name(self.step)


def snapshot_name(step: int) -> str:
    """Folder name of the snapshot taken after `step` steps."""
    return f"step-{step:08d}"


def snapshots(folder: str) -> list[Snapshot]:
    """Every snapshot of the folder that has its marker, newest first."""
    found = [
        Snapshot(int(match.group(1)), storage.join(folder, name))
        for name in storage.list_names(folder)
        if (match := _NAME.match(name))
    ]
    found.sort(key=lambda snapshot: snapshot.step, reverse=True)
    return [each for each in found if storage.exists(storage.join(each.uri, MARKER))]


def damage(snapshot: Snapshot) -> str | None:
    """What is wrong with the snapshot's files by their names and sizes; None if nothing is."""
    try:
        marker = json.loads(storage.read_text(storage.join(snapshot.uri, MARKER)))
        files = dict(marker["files"])
    except (ValueError, KeyError, TypeError) as error:
        return f"{MARKER} is unreadable ({error})"
    for name, expected in files.items():
        try:
            actual = storage.size(storage.join(snapshot.uri, name))
        except storage.MissingFileError:
            return f"{name} is missing"
        if actual != expected:
            return f"{name} has {actual} bytes instead of {expected}"
    return None


def marker_text(
    step: int,
    files: Mapping[str, int],
    metrics: Mapping[str, float],
    *,
    awaits_validation: bool = False,
) -> bytes:
    """Content of the marker: the files that must be there with their sizes, metrics of the step."""
    tree: dict[str, Any] = {"step": step, "files": dict(files), "metrics": dict(metrics)}
    if awaits_validation:
        tree[AWAITS] = True
    return _marker_bytes(tree)


def _marker_bytes(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree, indent=1, sort_keys=True).encode()


def _marker(snapshot: Snapshot) -> dict[str, Any]:
    """What the marker says; nothing if it is gone or unreadable."""
    try:
        tree = json.loads(storage.read_text(storage.join(snapshot.uri, MARKER)))
    except (storage.MissingFileError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def awaiting_validation(folder: str) -> list[Snapshot]:
    """Snapshots that are still to be validated, oldest first.

    Raises:
        StorageError: the storage cannot be reached.
    """
    return [each for each in reversed(snapshots(folder)) if _marker(each).get(AWAITS)]


def settle(snapshot: Snapshot, metrics: Mapping[str, float]) -> None:
    """The snapshot awaits no validation any more, and has these metrics besides: none if it could
    not be validated.

    Raises:
        StorageError: the storage cannot be reached.
    """
    tree = _marker(snapshot)
    if tree.pop(AWAITS, False):
        tree["metrics"] = {**tree["metrics"], **metrics}
        storage.write_bytes(storage.join(snapshot.uri, MARKER), _marker_bytes(tree))


def best(found: Sequence[Snapshot], config: CheckpointConfig, since: int) -> list[Snapshot]:
    """Those of the snapshots after step `since` that know best_metric, the best first, of equals
    the newest."""
    metric, later = config.best_metric, [each for each in found if each.step > since]
    scored = [(_metric(snapshot, metric), snapshot) for snapshot in later]
    known = [(score, each) for score, each in scored if score is not None]
    known.sort(key=lambda pair: pair[1].step, reverse=True)
    known.sort(key=lambda pair: pair[0], reverse=config.best_mode == "max")
    return [each for _, each in known]


def _metric(snapshot: Snapshot, name: str) -> float | None:
    """A metric of the snapshot's step; None if it has none or its marker is unreadable."""
    try:
        value = float(_marker(snapshot)["metrics"][name])
    except (ValueError, KeyError, TypeError):
        return None
    return value if math.isfinite(value) else None


def read_facts(snapshot: Snapshot) -> dict[str, Any]:
    """The facts that were saved with the tensors.

    Raises:
        CheckpointError: state.json is damaged: it is not there, or not what was written.
        StorageError: the storage cannot be reached.
    """
    place = storage.join(snapshot.uri, FACTS)
    try:
        facts = json.loads(storage.read_text(place))
    except (storage.MissingFileError, ValueError) as error:
        raise CheckpointError(f"{place}: {error}") from error
    if not isinstance(facts, dict) or facts.get("step") != snapshot.step:
        raise CheckpointError(f"{place}: is not that of step {snapshot.step}")
    return facts


def newest_facts(folder: str) -> dict[str, Any] | None:
    """Facts of the newest snapshot that can be read, as far as its sizes and facts tell; None if
    there is none.

    Raises:
        StorageError: the storage cannot be reached.
    """
    for snapshot in snapshots(folder):
        if damage(snapshot) is None:
            # A damaged one is said by whoever loads it.
            with suppress(CheckpointError):
                return read_facts(snapshot)
    return None


def prune(folder: str, *, newest: int, config: CheckpointConfig, since: int = 0) -> None:
    """Delete what is neither among the newest snapshots up to step `newest` nor among the best
    after step `since`, and awaits no validation.

    Folders that a crash has left without a marker go too. Whatever lies beyond step `newest` is
    left alone.
    """
    found = [snapshot for snapshot in snapshots(folder) if snapshot.step <= newest]
    kept = [each.name for each in found[: config.keep_latest]]
    kept += [each.name for each in found[config.keep_latest :] if _marker(each).get(AWAITS)]
    if config.keep_best:
        ranked = best(found, config, since)
        kept += [snapshot.name for snapshot in ranked[: config.keep_best]]
    for name in storage.list_names(folder):
        match = _ANY_NAME.match(name)
        if match and name not in kept and int(match.group(1)) <= newest:
            storage.delete_tree(storage.join(folder, name))
