"""What is wrong is found on the driver, in one clear line, before Ray starts work."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jobs import pretrain, sft
from jobs.lock import alone
from jobs.training_inputs import find_origin, inspect
from nsa_platform import storage
from nsa_platform.config.model import ModelConfig
from nsa_platform.config.runs import PretrainRun
from nsa_platform.model.transformer import Transformer, init_weights
from nsa_platform.model.weights import export_model
from nsa_platform.train.snapshots import FACTS, MARKER, marker_text

MODEL: dict[str, Any] = {
    "vocab_size": 512,
    "layers": 1,
    "width": 16,
    "ffn_width": 16,
    "max_context": 64,
    "attention": {
        "kind": "full",
        "query_heads": 2,
        "kv_heads": 1,
        "key_width": 8,
        "value_width": 8,
    },
}


def config(folder: Path, shards: Path, **changes: Any) -> str:
    """A YAML file of a small run; `changes` replace whole sections."""
    run = {
        "name": "run",
        "model": MODEL,
        "data": {"path": str(shards), "context_length": 32},
        "train": {"steps": 4, "tokens_per_step": 64},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        "storage": str(folder / "runs"),
    } | changes
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in run.items() if value is not None}))
    return str(path)


def refusal(capsys: pytest.CaptureFixture[str], job: Any, *arguments: str) -> str:
    """The error of a job that must end with status 1 without starting workers."""
    with pytest.raises(SystemExit) as ended:
        job.main(["--config", *arguments])
    output = capsys.readouterr()
    assert ended.value.code == 1
    assert "starting workers" not in output.out
    lines = output.err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_dry_run_needs_no_data(tmp_path: Path, capsys) -> None:
    pretrain.main(["--config", config(tmp_path, tmp_path / "nowhere"), "--dry-run"])
    output = capsys.readouterr().out
    for word in ("parameters", "FLOPs per step", "4 of 64 tokens", "memory per worker", "256 in"):
        assert word in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


def test_a_dry_run_has_a_row_for_each_stage(tmp_path: Path, capsys) -> None:
    stages = [
        {"steps": 3, "context_length": 64, "yarn": {"factor": 2, "original_context": 32}},
        {"steps": 2, "context_length": 64, "learning_rate": 2e-5},
    ]
    pretrain.main(["--config", config(tmp_path, tmp_path / "no", stages=stages), "--dry-run"])
    *_, header, first, second, third = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["stage", "to"]
    assert first.split()[:5] == ["1", "4", "32", "256", "0.0003"]
    assert second.split()[:7] == ["2", "7", "64", "yarn", "2x", "192", "0.0003"]
    assert third.split()[:7] == ["3", "9", "64", "yarn", "2x", "128", "2e-05"]


def test_checkpoints_of_stages(tmp_path: Path, tiny_shards, capsys) -> None:
    def path(first: int, *stages: int) -> str:
        later = [{"steps": steps, "context_length": 64} for steps in stages]
        train = {"steps": first, "tokens_per_step": 64}
        return config(tmp_path, tiny_shards.path, train=train, stages=later)

    run = PretrainRun.load(path(4, 3))
    origin = find_origin(run)
    _checkpoint(tmp_path, inspect(run, origin).described[1], step=6, stage=1)
    for wrong, said in (
        ((4,), "stage 2 has begun, the configuration has 1"),
        ((5, 3), "earlier.0.train.steps was 4, is 5"),
        ((4, 1), "6 steps are done, stages.0.steps=1 after 4 is less"),
    ):
        assert said in refusal(capsys, pretrain, path(*wrong))
    longer = PretrainRun.load(path(4, 5, 2))
    assert inspect(longer, origin).changes == ["train.steps was 7, is 9"]


def test_stages_with_data_of_another_tokenizer(tmp_path: Path, tiny_shards, capsys) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_shards.path / "tokenizer", other / "tokenizer")
    (other / "tokenizer" / "chat_template.jinja").write_text("another")
    stage = {"steps": 1, "context_length": 32, "data": {"path": str(other)}}
    error = refusal(capsys, pretrain, config(tmp_path, tiny_shards.path, stages=[stage]))
    assert f"{other}: was made with tokenizer" in error


def test_a_run_that_is_being_trained(tmp_path: Path, tiny_shards, capsys) -> None:
    lock = tmp_path / "runs" / "run" / "driver.lock"
    with alone(lock, what="anything"):
        error = refusal(capsys, pretrain, config(tmp_path, tiny_shards.path))
    assert f"run is being trained already: process {os.getpid()} on " in error
    with alone(lock, what="anything"):
        pass
    assert [path.name for path in lock.parent.iterdir()] == ["driver.lock"]


def test_a_folder_that_cannot_be_made(tmp_path: Path, tiny_shards, capsys) -> None:
    (tmp_path / "file").touch()
    error = refusal(
        capsys, pretrain, config(tmp_path, tiny_shards.path, storage=str(tmp_path / "file"))
    )
    assert error == f"error: storage={tmp_path}/file: {tmp_path}/file/run: Not a directory"


def test_chats_are_not_for_pretraining(tmp_path: Path, tiny_chat_shards, capsys) -> None:
    error = refusal(capsys, pretrain, config(tmp_path, tiny_chat_shards.path))
    assert f"{tiny_chat_shards.path}: holds chats, for jobs.sft" in error


def test_no_data(tmp_path: Path, capsys) -> None:
    nowhere = tmp_path / "nowhere"
    assert str(nowhere) in refusal(capsys, pretrain, config(tmp_path, nowhere))


def test_a_vocabulary_that_is_too_small(tmp_path: Path, tiny_shards, capsys) -> None:
    path = config(tmp_path, tiny_shards.path, model=MODEL | {"vocab_size": 400})
    error = refusal(capsys, pretrain, path)
    assert "model.vocab_size=400 must be at least 512" in error


def test_shards_of_another_tokenizer(tmp_path: Path, tiny_shards, capsys) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_shards.path, data)
    (data / "tokenizer" / "chat_template.jinja").write_text("another")
    error = refusal(capsys, pretrain, config(tmp_path, data))
    assert "was made with tokenizer" in error
    assert str(data / "train") in error


def test_a_broken_manifest(tmp_path: Path, tiny_shards, capsys) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_shards.path, data)
    manifest = data / "train" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tokens": ', '"tokens": 1', 1))
    assert str(manifest) in refusal(capsys, pretrain, config(tmp_path, data))


def test_storage_that_is_away(tmp_path: Path, tiny_shards, capsys, monkeypatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
    }.items():
        monkeypatch.setenv(name, value)
    path = config(tmp_path, tiny_shards.path, storage="s3://bucket/runs")
    error = refusal(capsys, pretrain, path)
    assert "http://127.0.0.1:9" in error
    assert "does not answer" in error


def _checkpoint(folder: Path, described: dict[str, Any], step: int = 2, stage: int = 0) -> None:
    """A snapshot by its facts alone: all that the driver looks at."""
    place = folder / "runs" / "run" / "checkpoints" / f"step-{step:08d}"
    facts = {"step": step, "stage": stage, "described": described, "tracking": {}}
    content = json.dumps(facts).encode()
    storage.write_bytes(str(place / FACTS), content)
    storage.write_bytes(str(place / MARKER), marker_text(step, {FACTS: len(content)}, {}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": MODEL | {"layers": 2}}, "model.layers was 1, is 2"),
        ({"data": {"context_length": 64}}, "data.context_length was 32, is 64"),
        ({"train": {"steps": 1, "tokens_per_step": 64}}, "2 steps are done, train.steps=1 is less"),
    ],
)
def test_checkpoints_of_another_run(
    tmp_path: Path, tiny_shards, capsys, changes: dict[str, Any], message: str
) -> None:
    digest = json.loads((tiny_shards.path / "train" / "manifest.json").read_text())["digest"]
    saved = PretrainRun.load(config(tmp_path, tiny_shards.path))
    described = saved.model_dump(mode="json", include={"model", "data", "train", "cluster"})
    _checkpoint(tmp_path, described | {"data_digest": digest})
    changes = {
        key: ({"path": str(tiny_shards.path)} if key == "data" else {}) | value
        for key, value in changes.items()
    }
    error = refusal(capsys, pretrain, config(tmp_path, tiny_shards.path, **changes))
    assert message in error
    assert str(tmp_path / "runs" / "run") in error
    assert "choose another name" in error.lower()


def test_checkpoints_of_a_version_with_fewer_keys(tmp_path: Path, tiny_shards) -> None:
    run = PretrainRun.load(config(tmp_path, tiny_shards.path))
    origin = find_origin(run)
    (described,) = inspect(run, origin).described
    described["model"]["attention"].pop("qk_norm")
    described["train"].pop("compile")
    described.pop("packing_rule")
    _checkpoint(tmp_path, described)
    assert inspect(run, origin).changes == []


def test_checkpoints_of_a_version_with_other_keys(tmp_path: Path, tiny_shards, capsys) -> None:
    run = PretrainRun.load(config(tmp_path, tiny_shards.path))
    origin = find_origin(run)
    (described,) = inspect(run, origin).described
    # How activations were recomputed had two keys once; it decides nothing of what is computed.
    described["train"] |= {"activation_checkpointing": "full", "activation_checkpointing_every": 1}
    _checkpoint(tmp_path, described)
    (change,) = inspect(run, origin).changes
    assert change.startswith("train.activation_checkpointing")
    described["train"]["of_another_version"] = 1
    _checkpoint(tmp_path, described)
    error = refusal(capsys, pretrain, config(tmp_path, tiny_shards.path))
    assert "another version has begun this run" in error
    assert "train: of_another_version: unknown key" in error and str(tmp_path / "runs") in error


def test_rows_that_an_older_version_laid_out_otherwise(tmp_path: Path, tiny_shards) -> None:
    data = {"path": str(tiny_shards.path), "context_length": 32, "packing": "whole"}
    run = PretrainRun.load(config(tmp_path, tiny_shards.path, data=data))
    origin = find_origin(run)
    (described,) = inspect(run, origin).described
    _checkpoint(tmp_path, described)
    assert inspect(run, origin).changes == []
    described.pop("packing_rule")
    _checkpoint(tmp_path, described)
    assert inspect(run, origin).changes == ["packing_rule was 'whole/1', is 'whole/2'"]


@pytest.fixture
def exported(tmp_path: Path, tiny_shards) -> Path:
    """A model with the tokenizer of tiny_shards."""
    model = Transformer(ModelConfig.parse(MODEL))
    init_weights(model, 0)
    with torch.no_grad():
        return export_model(
            tmp_path / "exported",
            model.config,
            model.state_dict(),
            tokenizer_dir=tiny_shards.tokenizer,
        )


def test_fine_tuning_a_folder_that_is_no_model(tmp_path: Path, tiny_chat_shards, capsys) -> None:
    path = config(
        tmp_path, tiny_chat_shards.path, model=None, checkpoint=str(tiny_chat_shards.path)
    )
    assert "config.json" in refusal(capsys, sft, path)


def test_fine_tuning_with_rows_that_are_too_long(
    tmp_path: Path, tiny_chat_shards, exported: Path, capsys
) -> None:
    data = {"path": str(tiny_chat_shards.path), "context_length": 128, "packing": "whole"}
    path = config(
        tmp_path,
        tiny_chat_shards.path,
        model=None,
        checkpoint=str(exported),
        data=data,
        train={"steps": 1, "tokens_per_step": 128},
    )
    error = refusal(capsys, sft, path)
    assert "data.context_length=128 must not exceed 64" in error


def test_fine_tuning_with_another_tokenizer(
    tmp_path: Path, tiny_chat_shards, exported: Path, capsys
) -> None:
    (exported / "chat_template.jinja").write_text("another")
    path = config(tmp_path, tiny_chat_shards.path, model=None, checkpoint=str(exported))
    error = refusal(capsys, sft, path)
    assert "was made with tokenizer" in error
    assert f"--set 'tokenizer={{path: {exported}}}'" in error


def test_fine_tuning_plans_from_the_models_own_config(
    tmp_path: Path, tiny_chat_shards, exported: Path, capsys
) -> None:
    path = config(tmp_path, tiny_chat_shards.path, model=None, checkpoint=str(exported))
    sft.main(["--config", path, "--dry-run"])
    assert "parameters" in capsys.readouterr().out
