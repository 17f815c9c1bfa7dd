"""Models are found wherever they are named, and what is wrong with one is told in a line."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from deployments.config import LLMConfig
from deployments.loading import StartError, start_engine
from nsa_platform.config.train import TrackingConfig
from nsa_platform.storage import upload_tree
from nsa_platform.tracking import open_run, register_model
from tests.conftest import DataFolder, S3Server


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def config(source: object, **loading: object) -> LLMConfig:
    return LLMConfig.parse(
        {
            "model_loading_config": {"model_id": "m", "model_source": str(source), **loading},
            "engine_kwargs": {"max_model_len": 64, "max_num_seqs": 2},
        }
    )


def reason(source: object, **loading: object) -> str:
    with pytest.raises(StartError) as caught:
        start_engine(config(source, **loading))
    text = str(caught.value)
    assert text.startswith("model 'm' cannot be served: ") and "\n" not in text
    return text


def test_a_folder(model_folder):
    engine, folder = start_engine(config(model_folder))
    assert folder == model_folder and engine.max_model_len == 64


@pytest.mark.cluster
def test_a_bucket(model_folder, s3_environment: S3Server):
    address = s3_environment.bucket("served") + "/model"
    upload_tree(model_folder, address)
    engine, folder = start_engine(config(address, tokenizer_source=address))
    assert engine.max_model_len == 64 and folder != model_folder
    assert "served/nothing" in reason(s3_environment.bucket("served") + "/nothing")


def test_a_registered_model(model_folder, tmp_path, monkeypatch):
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="served")
    handle = open_run(
        tracking,
        job="sft",
        name="run",
        params={},
        tags={},
        yaml_text="",
        queue_dir=tmp_path / "queue",
    )
    register_model(handle, model_folder, "served", "champion")
    engine, _ = start_engine(config("models:/served@champion", tracking_uri=tracking.uri))
    assert engine.max_model_len == 64
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri)
    assert start_engine(config("models:/served/1"))[0].max_model_len == 64
    assert "no model 'served' with the alias 'best'" in reason("models:/served@best")


def test_a_registry_that_is_not_named_or_not_there(tmp_path):
    assert "tracking_uri or MLFLOW_TRACKING_URI" in reason("models:/m@champion")
    place = f"sqlite:///{tmp_path}/nothing.db"
    assert "nothing.db" in reason("models:/m@champion", tracking_uri=place)


def test_folders_that_are_no_model(model_folder, tmp_path):
    assert "nothing" in reason(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "config.json" in reason(tmp_path / "empty")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        broken = shutil.copytree(model_folder, tmp_path / f"without-{name}")
        (broken / name).unlink()
        assert name in reason(broken)
    foreign = shutil.copytree(model_folder, tmp_path / "foreign")
    (foreign / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "only models exported by this platform" in reason(foreign)
    half = shutil.copytree(model_folder, tmp_path / "half")
    weights = (half / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "not a whole safetensors file" in reason(half)


def test_a_tokenizer_from_elsewhere(model_folder, tiny_shards: DataFolder, tmp_path):
    bare = shutil.copytree(model_folder, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    engine, _ = start_engine(config(bare, tokenizer_source=str(tiny_shards.tokenizer)))
    assert engine.tokenizer.encode("def")
    bigger = shutil.copytree(tiny_shards.tokenizer, tmp_path / "bigger")
    tree = json.loads((bigger / "tokenizer.json").read_text())
    tree["model"]["vocab"]["strange"] = 512
    (bigger / "tokenizer.json").write_text(json.dumps(tree))
    assert "do not belong together" in reason(bare, tokenizer_source=str(bigger))


def test_a_gpu_that_is_not_there(model_folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    asked = config(model_folder).model_copy(update={"accelerator_type": "H100"})
    with pytest.raises(StartError, match="has 1 GPUs by its configuration, and torch sees none"):
        start_engine(asked)
