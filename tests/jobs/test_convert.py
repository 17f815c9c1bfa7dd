"""jobs.convert: a checkpoint of transformers to a model that pretraining goes on from."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from jobs import convert, pretrain
from jobs.training_inputs import find_origin, inspect
from nsa_platform import storage
from nsa_platform.config.runs import PretrainRun
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.model.weights import load_config, load_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_shards) -> Path:
    """A small Llama with the tokenizer of tiny_shards."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=520,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    Tokenizer(tiny_shards.tokenizer).save(folder)
    return folder


def config(folder: Path, checkpoint: Path | str, **changes: Any) -> list[str]:
    """The flags of a conversion to small NSA blocks."""
    run = {
        "name": "small",
        "checkpoint": str(checkpoint),
        "attention": {
            "kind": "nsa",
            "compression_block_size": 8,
            "compression_stride": 4,
            "selection_block_size": 8,
            "num_selected_blocks": 4,
            "window_size": 32,
        },
        "output": str(folder / "model"),
    }
    path = folder / "convert.yaml"
    path.write_text(yaml.safe_dump(run | changes))
    return ["--config", str(path)]


def test_a_converted_model_is_pretrained_further(
    tmp_path: Path, checkpoint: Path, tiny_shards, capsys
) -> None:
    convert.main(config(tmp_path, checkpoint))
    assert str(tmp_path / "model") in capsys.readouterr().out
    model = load_config(tmp_path / "model")
    assert (model.name, model.max_context, model.attention.kind) == ("small", 128, "nsa")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        *("config.json", "model.safetensors", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    run = {
        "name": "further",
        "checkpoint": str(tmp_path / "model"),
        "data": {"path": str(tiny_shards.path), "context_length": 64},
        "train": {"steps": 2, "tokens_per_step": 128},
        "storage": str(tmp_path / "runs"),
    }
    path = tmp_path / "further.yaml"
    path.write_text(yaml.safe_dump(run))
    pretrain.main(["--config", str(path), "--dry-run"])
    assert "2 of 128 tokens" in capsys.readouterr().out
    parsed = PretrainRun.load(path)
    origin = find_origin(parsed)
    assert origin.start_from == str(tmp_path / "model") and origin.model == model
    assert inspect(parsed, origin).described[0]["start"] is not None


def test_what_is_no_model_is_not_replaced(tmp_path: Path, checkpoint: Path, capsys) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    other = tmp_path / "another"
    shutil.copytree(checkpoint, other)
    for output, said in (
        (str(tmp_path / "notes"), "holds mine.txt and no model of this platform"),
        (str(other), "and no model of this platform"),
        (str(checkpoint), "is the checkpoint itself"),
    ):
        with pytest.raises(SystemExit) as ended:
            convert.main([*config(tmp_path, checkpoint, output=output), "--dry-run"])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"
    assert (other / "model.safetensors").read_bytes() == (
        checkpoint / "model.safetensors"
    ).read_bytes()
    for _ in range(2):  # the second replaces the first
        convert.main(config(tmp_path, checkpoint))


def test_places_that_cannot_be_are_named_before_anything_is_written(
    tmp_path: Path, checkpoint: Path, capsys
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for changes, said in (
        ({"output": str(file)}, f"output={file}: is a file, must be a folder"),
        ({"output": f"{file}/a"}, f"output={file}/a: nothing can be written in {file} (Not a dir"),
        ({"output": "/proc/a/b"}, "output=/proc/a/b: nothing can be written in /proc (No such"),
        ({"output": "/dev/null"}, "output=/dev/null: is a file, must be a folder"),
        ({"checkpoint": str(file)}, f"checkpoint={file}: is a file, must be a folder with config"),
        ({"checkpoint": f"{file}/a"}, f"checkpoint={file}/a: cannot read {file}/a: it does not"),
    ):
        with pytest.raises(SystemExit) as ended:
            convert.main(config(tmp_path, **{"checkpoint": checkpoint} | changes))
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {said}") and error.count("\n") == 1
        assert "rrno" not in error
    assert file.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "convert.yaml"}


@pytest.mark.parametrize("kind", ["transformers", "our own"])
def test_a_context_holds_what_every_query_reads(
    kind: str, tmp_path: Path, checkpoint: Path, capsys
) -> None:
    source = str(checkpoint)
    if kind == "our own":
        source = str(tmp_path / "dense")
        convert.main(config(tmp_path, checkpoint, attention={"kind": "full"}, output=source))
    with pytest.raises(SystemExit) as ended:
        convert.main(config(tmp_path, source, max_context=23))
    assert ended.value.code == 2
    assert "max_context=23 must be at least 24: the 3 blocks of 8" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    convert.main([*config(tmp_path, source, max_context=24), "--dry-run"])
    assert "24 tokens" in capsys.readouterr().out


def test_our_own_model_with_full_attention_becomes_one_with_nsa(
    tmp_path: Path, checkpoint: Path, capsys
) -> None:
    dense = str(tmp_path / "dense")
    convert.main(config(tmp_path, checkpoint, attention={"kind": "full"}, output=dense))
    convert.main(config(tmp_path, dense))
    said = capsys.readouterr()
    assert "4 query heads" in said.out and said.err == ""
    convert.main([*config(tmp_path, dense), "--dry-run"])
    replaced = f"output={tmp_path / 'model'}: the model that is there is replaced"
    assert replaced in capsys.readouterr().err
    model, source = load_model(tmp_path / "model"), load_model(dense)
    assert (model.config.name, model.config.attention.kind) == ("small", "nsa")
    assert torch.equal(model.state_dict()["head.weight"], source.state_dict()["head.weight"])
    assert Tokenizer(tmp_path / "model").fingerprint == Tokenizer(checkpoint).fingerprint
    # What is sparse already is no start.
    with pytest.raises(SystemExit) as ended:
        convert.main(config(tmp_path, tmp_path / "model", output=str(tmp_path / "again")))
    assert ended.value.code == 2
    assert "attention.kind='nsa' must be 'full'" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@pytest.mark.cluster
def test_from_and_to_object_storage(tmp_path: Path, checkpoint: Path, s3_environment) -> None:
    bucket = s3_environment.bucket("convert")
    storage.upload_tree(checkpoint, f"{bucket}/llama")
    convert.main(
        config(
            tmp_path,
            f"{bucket}/llama",
            output=f"{bucket}/model",
            attention={"kind": "full"},
            cache_dir=str(tmp_path / "cache"),
        )
    )
    copy = load_model(storage.fetch(f"{bucket}/model", tmp_path / "cache"))
    wanted = LlamaForCausalLM.from_pretrained(checkpoint).state_dict()
    assert torch.equal(copy.state_dict()["head.weight"], wanted["lm_head.weight"])


def test_wrong_checkpoints_are_refused_before_anything_is_written(
    tmp_path: Path, checkpoint: Path, capsys
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for place, changes, said in (
        (empty, {}, f"{empty}: has no config.json; a checkpoint, an exported model too, is a"),
        (tmp_path / "none", {}, "none"),
        (checkpoint, {"attention": {"kind": "nsa", "compression_stride": 7}}, "must divide"),
    ):
        with pytest.raises(SystemExit) as ended:
            convert.main(config(tmp_path, place, **changes))
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
    convert.main([*config(tmp_path, checkpoint), "--dry-run"])
    assert "4 query heads" in capsys.readouterr().out
    assert not (tmp_path / "model").exists()
