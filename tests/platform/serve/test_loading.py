"""From a folder to an engine: it serves, or says in one line what is wrong."""

import argparse
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from nsa_platform.config.serve import EngineConfig
from nsa_platform.data.tokenizer import train_tokenizer
from nsa_platform.model.cost import count_parameters
from nsa_platform.model.weights import FINGERPRINT_KEY, ExportError, export_model, load_config
from nsa_platform.serve.capacity import CPU_MEMORY_SHARE
from nsa_platform.serve.generator import Generator
from nsa_platform.serve.kv_cache import KvCache
from nsa_platform.serve.loading import load_engine
from nsa_platform.serve.request import SamplingParams

CONFIG = EngineConfig(max_num_seqs=2)


@pytest.fixture
def folder(make_speaker, toy_tokenizer, tmp_path: Path) -> Path:
    model = make_speaker()
    return export_model(
        tmp_path / "model", model.config, model.state_dict(), tokenizer_dir=toy_tokenizer.folder
    )


def test_a_loaded_engine_serves_the_exported_model(folder, make_speaker):
    engine = load_engine(folder, CONFIG, "cpu")
    engine.add("a", [5, 6, 7], SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    ids = [token for output in outputs for token in output.token_ids]
    assert ids == list(Generator(make_speaker()).stream([5, 6, 7], 9))
    assert engine.cache.layers[0].page_tensors()[0].dtype == torch.float32


def test_weights_and_cache_take_the_dtype_that_is_asked_for(folder):
    engine = load_engine(folder, EngineConfig(max_num_seqs=1, dtype="bfloat16"), "cpu")
    assert engine.cache.layers[0].page_tensors()[0].dtype == torch.bfloat16
    assert engine.runner.model.embedding.weight.dtype == torch.bfloat16


def rewrite_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BREAKS = {
    "no-folder": (shutil.rmtree, "is no folder of an exported model"),
    "no-config": (lambda f: (f / "config.json").unlink(), "has no config.json; an exported model"),
    "no-weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors: does not exist"),
    "no-tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "foreign-config": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
        "model_type='llama'",
    ),
    "broken-weights": (
        lambda f: (f / "model.safetensors").write_bytes(b"\0" * 100),
        "is not a whole safetensors file",
    ),
    "broken-tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "cannot be read as a tokenizer",
    ),
    "large-tokenizer": (
        lambda f: train_tokenizer([argparse.__doc__ or ""], 400, f),
        "the tokenizer has 400 ids and the model knows 300: they do not belong together",
    ),
    "other-tokenizer": (
        lambda f: rewrite_config(f, **{FINGERPRINT_KEY: "0123"}),
        "was trained with the tokenizer 0123",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BREAKS.values(), ids=BREAKS)
def test_what_is_wrong_is_said_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_engine(folder, CONFIG, "cpu")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_recorded_tokenizer_is_accepted(folder, toy_tokenizer):
    rewrite_config(folder, **{FINGERPRINT_KEY: toy_tokenizer.fingerprint})
    load_engine(folder, CONFIG, "cpu")


def test_sizes_are_refused_before_the_weights_are_read(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="max_model_len=129"):
        load_engine(folder, EngineConfig(max_model_len=129), "cpu")


def test_a_longer_context_needs_no_other_weights(folder, make_speaker):
    longer: Any = {"max_context": 512, "yarn": {"factor": 4, "original_context": 128}}
    engine = load_engine(folder, EngineConfig(max_num_seqs=1, hf_overrides=longer), "cpu")
    assert engine.max_model_len == 512
    engine.add("a", [5, 6, 7] * 60, SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    ids = [token for output in outputs for token in output.token_ids]
    stretched = make_speaker(None, **longer)
    assert ids == list(Generator(stretched).stream([5, 6, 7] * 60, 9))
    assert ids != list(Generator(make_speaker(max_context=512)).stream([5, 6, 7] * 60, 9))


def test_other_kernels_or_another_configuration_are_noticed(folder, caplog):
    load_engine(folder, CONFIG, "cpu")
    assert not caplog.records
    tree = json.loads((folder / "config.json").read_text())
    recorded = tree["computed_by"]
    rewrite_config(folder, computed_by={**recorded, "sources": "0123"})
    load_engine(folder, CONFIG, "cpu")
    assert f"sources: 0123 when the model was exported, {recorded['sources']} here" in caplog.text
    strict = CONFIG.model_copy(update={"identity_mismatch": "error"})
    with pytest.raises(ExportError, match="may select other blocks than in its training"):
        load_engine(folder, strict, "cpu")
    changed = {**tree["nsa_platform"], "rope_base": 5000.0}
    rewrite_config(folder, computed_by=recorded, nsa_platform=changed)
    with pytest.raises(ExportError, match=r"\(config: .* when the model was exported"):
        load_engine(folder, strict, "cpu")
    caplog.clear()
    load_engine(folder, CONFIG.model_copy(update={"identity_mismatch": "ignore"}), "cpu")
    # A model that says nothing, from an earlier export, is taken as it is.
    rewrite_config(folder, computed_by={})
    load_engine(folder, strict, "cpu")
    assert not caplog.records


def test_what_does_not_fit_is_told_before_weights_are_read(folder, monkeypatch):
    (folder / "model.safetensors").unlink()
    weight_bytes = 4 * count_parameters(load_config(folder)).total

    def reason(available: float, **sizes: Any) -> str:
        found = SimpleNamespace(available=available)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: found)
        with pytest.raises(ValueError) as caught:
            load_engine(folder, EngineConfig(max_num_seqs=2, **sizes), "cpu")
        return str(caught.value)

    assert "use a larger tensor_parallel_size than 1" in reason(weight_bytes - 1)
    cache_bytes = KvCache(
        load_config(folder), num_tokens=100, max_new_tokens=128, max_sequences=2,
        max_step_tokens=2048, enable_prefix_caching=True, device="meta",
    ).num_bytes()  # fmt: skip
    tight = weight_bytes + cache_bytes / CPU_MEMORY_SHARE
    text = reason(tight)
    assert "less than one request of max_model_len=128" in text
    assert 96 <= int(re.findall(r"hold (\d+) tokens", text)[0]) < 128
    assert "num_kv_tokens=5000 must be lower" in reason(tight, num_kv_tokens=5000)
    # What fits is looked for.
    assert "model.safetensors: does not exist" in reason(2 * tight)
