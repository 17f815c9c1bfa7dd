"""What a training job finds before it starts: data, tokenizer, starting weights, checkpoints.

Everything that can be wrong is found here, on the driver, before Ray starts work.
"""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch

from nsa_platform import storage
from nsa_platform.config.base import ConfigError
from nsa_platform.config.data import LoaderConfig
from nsa_platform.config.model import ModelConfig
from nsa_platform.config.runs import EvaluateRun, PretrainRun, SftRun
from nsa_platform.config.train import TrainConfig
from nsa_platform.data.manifest import Manifest, ShardError, TokenizerMismatch
from nsa_platform.data.shards import open_mixture, open_split
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.model.weights import CONFIG_FILE, load_config, weights_digest
from nsa_platform.tracking import fetch_model, is_model_reference
from nsa_platform.train.export import upload_config_last
from nsa_platform.train.needles import haystacks
from nsa_platform.train.resume import ResumeError, check_resumable, describe_run
from nsa_platform.train.snapshots import newest_facts

FINISHED = "finished.json"
_GONE = frozenset({"activation_checkpointing_every"})
"""Keys of earlier versions that had no say in what is computed."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The model that a run trains and where its weights come from."""

    model: ModelConfig
    start_from: str | None
    """Exported folder that every worker can reach; None: from scratch."""
    local: Path | None
    """The same folder on this machine."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What was found."""

    has_validation: tuple[bool, ...]
    """Whether there are held-out rows, of each stage."""
    described: tuple[dict[str, Any], ...]
    """The configuration as checkpoints of each stage remember it."""
    facts: dict[str, Any] | None
    """Facts of the newest whole checkpoint."""
    changes: list[str]
    """What differs from that checkpoint's configuration and may."""


def run_folder(run: PretrainRun | SftRun | EvaluateRun) -> str:
    """Folder of the run: checkpoints, model and what is local to it."""
    return storage.join(run.storage, run.name)


def cache_folder(run: PretrainRun | SftRun) -> Path:
    """Local folder for copies of remote files."""
    return Path(run.data.cache_dir or storage.default_cache("files"))


def private_folder(run: PretrainRun | SftRun | EvaluateRun) -> Path:
    """Local folder of what must not be remote: the run's own, or one in the user's cache."""
    folder = run_folder(run)
    if not storage.is_remote(folder):
        return Path(folder)
    key = hashlib.sha256(folder.encode()).hexdigest()[:12]
    return Path.home() / ".cache" / "nsa_platform" / "runs" / f"{run.name}-{key}"


def make_private_folder(run: PretrainRun | SftRun | EvaluateRun) -> Path:
    """As private_folder, and it is there.

    Raises:
        OSError: it cannot be made; the message names the key.
    """
    folder = private_folder(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"storage={run.storage}: {folder}: {error.strerror}") from None
    return folder


def find_origin(run: PretrainRun | SftRun) -> Origin:
    """A new model, or the exported one that `checkpoint` names.

    Raises:
        ValueError: it is not an exported model, or its context is too short for the data.
        OSError: it cannot be read, or the registry does not know it.
    """
    if isinstance(run, PretrainRun) and run.model is not None:
        return Origin(model=run.model, start_from=None, local=None)
    place, cache = run.checkpoint, cache_folder(run)
    assert place is not None
    if is_model_reference(place) and storage.exists(storage.join(_start(run), CONFIG_FILE)):
        place = _start(run)
    if is_model_reference(place):
        local = fetch_model(place, run.tracking.uri, cache)
    else:
        local = storage.fetch(place, cache)
    model = load_config(local)
    if run.data.context_length > model.max_context:
        raise ValueError(
            f"data.context_length={run.data.context_length} must not exceed {model.max_context}, "
            f"the max_context of {run.checkpoint}"
        )
    misfits = run.model_problems(model)
    if run.train.lora is not None:
        misfits += [f"train.lora.{line}" for line in run.train.lora.model_problems(model)]
    if misfits:
        raise ValueError("; ".join(misfits))
    return Origin(model=model, start_from=place, local=local)


def keep_start(run: PretrainRun | SftRun, origin: Origin) -> Origin:
    """Put a registered model beside the run: there all workers can read it, and it stays the same
    if its alias moves on while the run is restarted."""
    if origin.local is None or not is_model_reference(origin.start_from or ""):
        return origin
    upload_config_last(origin.local, _start(run))
    return replace(origin, start_from=_start(run))


def _start(run: PretrainRun | SftRun) -> str:
    """Where the run keeps what its reference stood for when it began."""
    key = hashlib.sha256((run.checkpoint or "").encode()).hexdigest()[:12]
    return storage.join(run_folder(run), f"start-{key}")


def inspect(run: PretrainRun | SftRun, origin: Origin) -> Inputs:
    """Look at data, tokenizer and checkpoints.

    Raises:
        ShardError: no finished shards, or none of the tokenizer that the model has.
        ValueError: the tokenizer, the model and the data do not fit each other.
        ResumeError: the folder holds checkpoints of another run.
        OSError: storage cannot be reached, or this machine alone has too few GPUs.
    """
    if run.cluster.use_gpu:
        _check_gpus(run.cluster.min_workers or run.cluster.num_workers)
    stages = run.in_stages()
    tokenizers = [_tokenizer(stage.data.path, run) for stage in stages]
    for stage, tokenizer in zip(stages, tokenizers, strict=True):
        if tokenizer.fingerprint != tokenizers[0].fingerprint:
            raise TokenizerMismatch(
                f"{stage.data.path}: was made with tokenizer {tokenizer.fingerprint[:12]}, "
                f"{run.data.path} with {tokenizers[0].fingerprint[:12]}"
            )
    start = None if origin.local is None else weights_digest(origin.local)
    has_validation: list[bool] = []
    described: list[dict[str, Any]] = []
    for stage, tokenizer in zip(stages, tokenizers, strict=True):
        has_rows, digest = _look(run, stage.data, tokenizer)
        has_validation.append(has_rows)
        sections = {"data": stage.data, "train": stage.train, "cluster": run.cluster}
        sections["model"] = stage.model_of(origin.model)
        tree = {name: section.model_dump(mode="json") for name, section in sections.items()}
        described.append(describe_run(tree, data_digest=digest, start=start, earlier=described))
    _check_tokenizer(run, origin, tokenizers[0])
    # Needles that have no room are told before anything starts; any filler tells.
    haystacks(tokenizers[0], run.train.needle, run.train.needle.lengths, [0])
    facts = newest_facts(storage.join(run_folder(run), "checkpoints"))
    changes = [] if facts is None else _changes(run, facts, described)
    return Inputs(tuple(has_validation), tuple(described), facts, changes)


def _check_gpus(count: int) -> None:
    """Tell that a local cluster would never have so many GPUs.

    Raises:
        ConnectionError: it would not, and no other cluster is named or connected to.
    """
    if ray.is_initialized() or os.environ.get("RAY_ADDRESS"):
        return
    if (here := torch.cuda.device_count()) < count:
        raise ConnectionError(
            f"cluster.use_gpu: the run needs {count} GPUs and this machine has {here}; RAY_ADDRESS "
            "names a cluster that has them"
        )


def _tokenizer(path: str, run: PretrainRun | SftRun) -> Tokenizer:
    try:
        return Tokenizer(storage.fetch(storage.join(path, "tokenizer"), cache_folder(run)))
    except storage.MissingFileError as error:
        raise ShardError(f"data.path={path}: {error}; jobs.prepare_data makes it") from None


def _look(run: PretrainRun | SftRun, data: LoaderConfig, tokenizer: Tokenizer) -> tuple[bool, str]:
    """Whether there are held-out rows, and the digest of all shards that are trained on."""
    fingerprint = tokenizer.fingerprint
    train, validation = (
        open_split(data, split, tokenizer_fingerprint=fingerprint).manifest
        for split in ("train", "validation")
    )
    mixture = [shards.manifest for shards in open_mixture(data, tokenizer_fingerprint=fingerprint)]
    for path, manifest in zip(_paths(data), [train, *mixture], strict=True):
        if isinstance(run, PretrainRun) and manifest.kind == "chat":
            raise ShardError(f"{path}: holds chats, for jobs.sft; pretraining wants text")
        if isinstance(run, SftRun) and manifest.kind != "chat":
            raise ShardError(f"{path}: holds texts, for jobs.pretrain; fine-tuning wants chats")
        if manifest.kind != train.kind:
            raise ShardError(f"{path}: holds {manifest.kind}s, {data.path} {train.kind}s")
        if not manifest.tokens:
            raise ShardError(f"{path}/train: holds no tokens; there is nothing to train on")
    return validation.tokens > 0, _digest([train, *mixture])


def _changes(
    run: PretrainRun | SftRun, facts: dict[str, Any], described: list[dict[str, Any]]
) -> list[str]:
    """What differs from the configuration of the newest checkpoint's stage, and may."""
    folder, number, stages = run_folder(run), facts.get("stage", 0), run.in_stages()
    if number >= len(stages):
        raise ResumeError(
            f"{folder}: stage {number + 1} has begun, the configuration has {len(stages)}; choose "
            "another name for another run"
        )
    try:
        changes = check_resumable(_written_now(facts["described"]), described[number])
    except ResumeError as error:
        raise ResumeError(f"{folder}: {error}") from None
    except ConfigError as error:
        raise ResumeError(
            f"{folder}: another version has begun this run, in words that this one does not know: "
            f"{error}; go on with that version, or choose another name for another run"
        ) from None
    stage = stages[number]
    if facts["step"] > stage.last_step:
        after = f" after {stage.first_step}" if stage.first_step else ""
        raise ResumeError(
            f"{folder}: {facts['step']} steps are done, "
            f"{stage.key}={stage.last_step - stage.first_step}{after} is less; choose another name "
            "for another run"
        )
    return changes


def _written_now(described: dict[str, Any]) -> dict[str, Any]:
    """What an older version has described, with the defaults of keys that it did not have yet."""
    sections = {"model": ModelConfig, "data": LoaderConfig, "train": TrainConfig}
    now = {"packing_rule": f"{described['data'].get('packing', 'split')}/1", **described}
    for name, root in sections.items():
        kept = {key: value for key, value in described[name].items() if key not in _GONE}
        now[name] = root.parse(kept, source=name).model_dump(mode="json")
    if "earlier" in described:
        now["earlier"] = [_written_now(each) for each in described["earlier"]]
    return now


def _paths(data: LoaderConfig) -> list[str]:
    return [data.path, *(source.path for source in data.mixture)]


def _digest(manifests: list[Manifest]) -> str:
    """Of all shards that are trained on, in the order of the configuration."""
    if len(manifests) == 1:
        return manifests[0].digest
    return hashlib.sha256("".join(each.digest for each in manifests).encode()).hexdigest()


def read_finished(run: PretrainRun | SftRun, inputs: Inputs) -> dict[str, Any] | None:
    """What the finished run has left; None if it is not finished or something has changed."""
    place = storage.join(run_folder(run), FINISHED)
    if inputs.facts is None or inputs.changes or not storage.exists(place):
        return None
    try:
        finished = json.loads(storage.read_text(place))
    except ValueError as error:
        raise ValueError(f"{place}: is not whole ({error}); delete it and start again") from None
    wanted = run.tracking.registered_model
    is_registered = wanted is None or f"models:/{wanted}@" in (finished.get("registered") or "")
    is_there = storage.exists(storage.join(run_folder(run), "model", "config.json"))
    same = finished.get("step") == run.in_stages()[-1].last_step
    return finished if same and is_registered and is_there else None


def write_finished(run: PretrainRun | SftRun, result: dict[str, Any]) -> None:
    """Say that the run is finished."""
    text = json.dumps(result, indent=1, sort_keys=True)
    storage.write_text(storage.join(run_folder(run), FINISHED), text)


def _check_tokenizer(run: PretrainRun | SftRun, origin: Origin, tokenizer: Tokenizer) -> None:
    if origin.local is not None:
        trained_with = Tokenizer(origin.local).fingerprint
        if trained_with != tokenizer.fingerprint:
            raise TokenizerMismatch(
                f"{run.data.path}: was made with tokenizer {tokenizer.fingerprint[:12]}, but the "
                f"model {origin.start_from} was trained with {trained_with[:12]}; prepare the data "
                f"again with --set 'tokenizer={{path: {origin.local}}}'"
            )
    if tokenizer.vocab_size > origin.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={origin.model.vocab_size} must be at least {tokenizer.vocab_size}, "
            f"the ids of the tokenizer in {run.data.path}"
        )
