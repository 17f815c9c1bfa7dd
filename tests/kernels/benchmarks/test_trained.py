"""What a trained model chooses is recorded as it runs, and summed up over its layers."""

import json

import numpy as np
import pytest
import torch

from benchmarks import trained
from benchmarks.overlap import measure_overlap
from nsa_kernels import NsaConfig
from nsa_platform.config.model import ModelConfig
from nsa_platform.data.tokenizer import Tokenizer, train_tokenizer
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.transformer import Transformer, init_weights
from nsa_platform.model.weights import export_model

CONFIG = NsaConfig(8, 4, 16, 4, 1, 2, 24)
TEXT = "for each of the blocks that a token reads, say which one it is and how near it lies\n" * 60


@pytest.fixture(autouse=True)
def fast_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_KERNELS_BACKEND", "torch")


def make_model(vocab_size: int) -> Transformer:
    config = ModelConfig.parse(
        {
            "name": "tiny",
            "vocab_size": vocab_size,
            "layers": 3,
            "width": 32,
            "ffn_width": 32,
            "max_context": 512,
            "attention": {
                "kind": "nsa",
                "query_heads": 4,
                "kv_heads": 2,
                "key_width": 16,
                "value_width": 16,
                "compression_block_size": 8,
                "compression_stride": 4,
                "selection_block_size": 16,
                "num_selected_blocks": 4,
                "window_size": 24,
            },
        }
    )
    model = Transformer(config)
    init_weights(model, seed=1)
    return model.eval()


def test_choices_are_recorded_and_change_nothing() -> None:
    model, ids = make_model(64), torch.arange(300) % 64
    inputs = PackedInputs.from_lengths([300])
    with torch.no_grad():
        before = model(ids, inputs).hidden
        choices = trained.recorded_choices(model, ids)
        after = model(ids, inputs).hidden
    assert torch.equal(before, after)
    assert [tuple(chosen.shape) for chosen in choices] == [(300, 2, 4)] * 3
    own = torch.arange(300)[:, None] // 16
    for chosen in choices:
        assert torch.equal(chosen.max(-1).values, own.expand(300, 2).int())

    records = trained.overlap_records(choices, CONFIG, "a tiny model")
    found = [measure_overlap(chosen, CONFIG) for chosen in choices]
    mean = sum(each.kept for each in found) / 3
    assert records[0]["value"] == pytest.approx(mean)
    most, least = (record["union"]["16"] for record in records[1:])
    assert most == min(each.union[16] for each in found) < least


def test_an_exported_model_is_measured(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("trained")
    tokenizer: Tokenizer = train_tokenizer([TEXT], 300, folder / "tokenizer")
    model = make_model(tokenizer.vocab_size)
    exported = export_model(folder / "model", model.config, model.state_dict())
    tokenizer.save(exported)
    (folder / "text").write_text(TEXT)
    arguments = [str(exported), str(folder / "text"), "--tokens", "256"]
    arguments += ["--json", str(folder / "overlap.json"), "--npz", str(folder / "blocks.npz")]
    monkeypatch.setattr("sys.argv", ["trained.py", *arguments])
    assert trained.main() == 0
    records = json.loads((folder / "overlap.json").read_text())
    assert [record["model"] for record in records] == ["tiny"] * 3
    assert {"device", "versions", "commit", "date", "command"} < set(records[0])
    with np.load(folder / "blocks.npz") as file:
        assert file["layer2"].shape == (256, 2, 4)

    monkeypatch.setattr("sys.argv", ["trained.py", *arguments[:3], "100000"])
    assert trained.main() == 2
