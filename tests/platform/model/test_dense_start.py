"""Our own models with full attention as the start of models with NSA."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_platform.config.convert import FullConversion, NsaConversion
from nsa_platform.model.attention import NsaAttention
from nsa_platform.model.conversion import ConversionError, convert_weights
from nsa_platform.model.dense_start import is_own, open_dense
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.transformer import Transformer
from nsa_platform.model.weights import ExportError, export_model, load_config, load_model

LENGTH = 64
NSA = NsaConversion(
    compression_block_size=8,
    compression_stride=4,
    selection_block_size=8,
    num_selected_blocks=8,  # all of a text of 64 tokens
    window_size=12,
    branch_kv="shared",
    compression="mean",
    gate_bias=(-30.0, 30.0, -30.0),
)


@pytest.fixture
def export(tmp_path: Path, make_config, make_model):
    """Exports a toy model and tells the folder."""

    def write(name: str = "dense", attention: dict[str, Any] | None = None, **fields: Any) -> Path:
        config = make_config({"kind": "full", **(attention or {})}, **fields)
        return export_model(tmp_path / name, config, make_model(config).state_dict())

    return write


def converted(folder: Path, attention: NsaConversion | FullConversion) -> Transformer:
    foreign = open_dense(folder, attention, name="sparse")
    model = Transformer(foreign.config)
    model.load_state_dict(convert_weights(foreign, seed=0))
    return model


def scores(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(ids, PackedInputs.from_lengths([len(ids)])).hidden)


@pytest.mark.parametrize("branch_kv", ["separate", "shared"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attention": {"qkv_bias": True, "qk_norm": True}},
        {"attention": {"value_width": 24}, "tie_embeddings": False, "rope_base": 500.0},
        {
            "moe": {
                "routed_experts": 4,
                "experts_per_token": 2,
                "expert_width": 16,
                "shared_experts": 1,
            }
        },
    ],
    ids=["plain", "biases and norms", "wide values", "experts"],
)
def test_where_all_is_selected_the_selected_branch_is_full_attention(export, fields, branch_kv):
    folder = export(**fields)
    ids = torch.randint(0, 61, (LENGTH,))
    wanted = scores(load_model(folder), ids)
    assert float(wanted.std()) > 0.3
    sparse = converted(folder, NSA.model_copy(update={"branch_kv": branch_kv}))
    torch.testing.assert_close(scores(sparse, ids), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compression", ["mean", "linear", "mlp"])
def test_every_branch_starts_with_the_models_keys_and_values(export, compression):
    folder = export()
    source = load_model(folder).state_dict()
    choices = {"branch_kv": "separate", "compression": compression}
    model = converted(folder, NSA.model_copy(update=choices))
    for index in range(2):
        attention = model.get_submodule(f"layers.{index}.attention")
        assert isinstance(attention, NsaAttention)
        dense = source[f"layers.{index}.attention.key_value.weight"]
        keys, values = attention.key_value.weight.split([3 * 2 * 16, 3 * 2 * 8])
        for part in keys.chunk(3):
            assert torch.equal(part, dense[: 2 * 16])
        for part in values.chunk(3):
            assert torch.equal(part, dense[2 * 16 :])
        blocks = torch.randn(2, 5, 8, 16)
        folded = attention.compress_key(blocks)
        torch.testing.assert_close(folded, blocks.mean(2).transpose(0, 1))


def test_with_full_attention_it_is_the_same_model_of_another_name_and_context(export):
    folder = export()
    foreign = open_dense(folder, FullConversion(), name="longer", max_context=1024)
    dense = load_config(folder)
    assert foreign.config == dense.model_copy(update={"name": "longer", "max_context": 1024})
    state, source = convert_weights(foreign, seed=0), load_model(folder).state_dict()
    assert state.keys() == source.keys()
    assert all(torch.equal(state[name], source[name]) for name in source)


def test_what_has_no_full_attention_is_refused(export, tmp_path):
    for attention, said in (
        ({"kind": "nsa"}, "attention.kind='nsa' must be 'full'"),
        ({"kind": "mla"}, "attention.kind='mla' must be 'full'"),
        ({"gated": True}, "attention.gated=true must be false"),
    ):
        with pytest.raises(ConversionError, match=said):
            open_dense(
                export(attention["kind"] if "kind" in attention else "gated", attention),
                NSA,
                name="x",
            )
    whole = export("whole")
    with pytest.raises(ConversionError, match="compression_stride"):
        open_dense(whole, NSA.model_copy(update={"compression_stride": 7}), name="x")
    (whole / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ExportError, match="safetensors"):
        open_dense(whole, NSA, name="x")


def test_ours_are_told_from_others(export, tmp_path):
    assert is_own(export())
    assert not is_own(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert not is_own(tmp_path)
    (tmp_path / "config.json").write_text("[")
    assert not is_own(tmp_path)
