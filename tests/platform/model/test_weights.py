"""Export and load: bit-exact, whole or not at all, clear about foreign files."""

import json

import pytest
import torch

from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.weights import ExportError, export_model, load_config, load_model

VARIANTS = [
    {},
    {"tie_embeddings": False},
    {"moe": {"routed_experts": 3, "experts_per_token": 2, "expert_width": 8}},
]


@pytest.fixture
def exported(tmp_path, make_config, make_model):
    model = make_model(make_config())
    return export_model(tmp_path / "model", model.config, model.state_dict())


@pytest.mark.parametrize("fields", VARIANTS)
def test_round_trip_is_bit_exact(tmp_path, make_config, make_model, fields):
    model = make_model(make_config(**fields))
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    folder = export_model(
        tmp_path / "deep" / "model", model.config, model.state_dict(), tokenizer_dir=tokenizer
    )
    assert load_config(folder) == model.config
    loaded = load_model(folder)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    ids, inputs = torch.arange(40), PackedInputs.from_lengths([40])
    assert torch.equal(model(ids, inputs).hidden, loaded(ids, inputs).hidden)
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_weights_are_cast_on_loading_when_asked(exported):
    assert load_model(exported, dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16


def test_an_export_replaces_the_one_before(exported, make_config, make_model):
    (exported / "stale.txt").write_text("old")
    model = make_model(make_config(), seed=5)
    export_model(exported, model.config, model.state_dict())
    assert not (exported / "stale.txt").exists()
    assert torch.equal(load_model(exported).norm.weight, model.norm.weight)
    assert [path.name for path in exported.parent.iterdir()] == ["model"]


def test_a_failed_export_leaves_the_old_one(exported, make_config, make_model, monkeypatch):
    before = (exported / "model.safetensors").read_bytes()
    model = make_model(make_config(), seed=5)

    def disk_is_full(*_args, **_kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("nsa_platform.model.weights.save_file", disk_is_full)
    with pytest.raises(OSError, match="no space"):
        export_model(exported, model.config, model.state_dict())
    assert (exported / "model.safetensors").read_bytes() == before
    assert [path.name for path in exported.parent.iterdir()] == ["model"]


def test_config_json_speaks_to_transformers_users(exported):
    tree = json.loads((exported / "config.json").read_text())
    assert tree["model_type"] == "nsa" and tree["architectures"] == ["NsaForCausalLM"]
    assert (tree["hidden_size"], tree["num_hidden_layers"], tree["vocab_size"]) == (32, 2, 61)
    assert tree["max_position_embeddings"] == 256 and tree["dtype"] == "float32"


def test_export_refuses_weights_that_do_not_fit(tmp_path, make_config, make_model):
    model = make_model(make_config())
    state = model.state_dict()
    for changed, text in (
        ({k: v for k, v in state.items() if k != "norm.weight"}, "norm.weight is missing"),
        ({**state, "extra": torch.zeros(1)}, "extra is unknown"),
        ({**state, "norm.weight": torch.zeros(3)}, r"norm.weight has shape \(3,\) instead of"),
    ):
        with pytest.raises(ExportError, match=text):
            export_model(tmp_path / "model", model.config, changed)
    with pytest.raises(ExportError, match="tokenizer_dir"):
        export_model(tmp_path / "model", model.config, state, tokenizer_dir=tmp_path / "none")
    assert not list(tmp_path.iterdir())


def _break_weights(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _other_vocabulary(folder):
    tree = json.loads((folder / "config.json").read_text())
    tree["nsa_platform"]["vocab_size"] += 1
    (folder / "config.json").write_text(json.dumps(tree))


def _mistyped_key(folder):
    tree = json.loads((folder / "config.json").read_text())
    tree["nsa_platform"]["widht"] = tree["nsa_platform"].pop("width")
    (folder / "config.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (
            lambda f: (f / "config.json").unlink(),
            "has no config.json; an exported model is a folder with",
        ),
        (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "llama"),
        (_mistyped_key, "did you mean 'width'"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: does not exist"),
        (_break_weights, "model.safetensors: is not a whole safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b"junk"), "is not a whole safetensors"),
        (_other_vocabulary, r"embedding.weight has shape \(61, 32\) instead of \(62, 32\)"),
    ],
)
def test_broken_and_foreign_folders_are_named(exported, damage, text):
    damage(exported)
    with pytest.raises(ExportError, match=text):
        load_model(exported)
