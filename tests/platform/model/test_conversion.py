"""Checkpoints of transformers as this platform's models, against transformers' own scores."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from nsa_platform.config.convert import FullConversion, NsaConversion
from nsa_platform.model import hf
from nsa_platform.model.attention import NsaAttention
from nsa_platform.model.conversion import ConversionError, convert_weights, open_checkpoint
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.transformer import Transformer
from nsa_platform.model.weights import export_model, load_model

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "llama-3.1": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "wide-heads": LlamaConfig(**SIZES, head_dim=16),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
}
NSA = NsaConversion(
    compression_block_size=8,
    compression_stride=4,
    selection_block_size=8,
    num_selected_blocks=4,
    window_size=64,
)


def foreign_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with every parameter away from the zeros and ones that it would start with."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return model.eval()


def converted(folder: Path, attention: NsaConversion | FullConversion) -> Transformer:
    foreign = open_checkpoint(folder, attention, name="test")
    model = Transformer(foreign.config)
    model.load_state_dict(convert_weights(foreign, seed=0))
    return model


def scores(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    rows, length = ids.shape
    with torch.no_grad():
        hidden = model(ids.flatten(), PackedInputs.from_lengths([length] * rows)).hidden
        return model.logits(hidden).unflatten(0, (rows, length))


@pytest.mark.parametrize("shape", SHAPES)
def test_with_full_attention_the_scores_are_those_of_transformers(tmp_path, shape):
    theirs = foreign_model(SHAPES[shape])
    # Several files, as large checkpoints come.
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = torch.randint(0, 67, (2, 150))
    with torch.no_grad():
        wanted = theirs(ids).logits
    found = scores(converted(tmp_path, FullConversion()), ids)
    assert float(wanted.std()) > 0.3
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("branch_kv", ["separate", "shared"])
@pytest.mark.parametrize("compression", ["mean", "linear", "mlp"])
def test_every_branch_starts_with_the_checkpoints_keys_and_values(tmp_path, branch_kv, compression):
    theirs = foreign_model(SHAPES["qwen3"])
    theirs.save_pretrained(tmp_path)
    choices = NSA.model_copy(update={"branch_kv": branch_kv, "compression": compression})
    model = converted(tmp_path, choices)
    copies = 3 if branch_kv == "separate" else 1
    source = theirs.state_dict()
    for index in range(2):
        attention = model.get_submodule(f"layers.{index}.attention")
        assert isinstance(attention, NsaAttention)
        keys, values = attention.key_value.weight.chunk(2)
        for part in keys.chunk(copies):
            assert torch.equal(part, source[f"model.layers.{index}.self_attn.k_proj.weight"])
        for part in values.chunk(copies):
            assert torch.equal(part, source[f"model.layers.{index}.self_attn.v_proj.weight"])
        blocks = torch.randn(2, 5, 8, 16)
        folded = attention.compress_key(blocks)
        torch.testing.assert_close(folded, blocks.mean(2).transpose(0, 1))
        assert attention.gate is not None
        gates = torch.sigmoid(attention.gate(torch.randn(3, 32))).unflatten(1, (4, 3))
        assert gates[..., 2].min() > 0.98 and gates[..., :2].max() < 0.01


def test_within_the_window_the_model_is_nearly_what_it_was(tmp_path):
    theirs = foreign_model(SHAPES["llama"])
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, 67, (2, 64))
    with torch.no_grad():
        wanted = theirs(ids).logits
    found = scores(converted(tmp_path, NSA), ids)
    error = (found - wanted).norm() / wanted.norm()
    assert error < 0.02
    open_gates = NSA.model_copy(update={"gate_bias": (0.0, 0.0, 0.0)})
    far = (scores(converted(tmp_path, open_gates), ids) - wanted).norm() / wanted.norm()
    assert far > 5 * error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_round_trip_through_transformers_is_bit_exact(tmp_path, dtype):
    foreign_model(SHAPES["qwen2"]).to(dtype).save_pretrained(tmp_path / "theirs")
    foreign = open_checkpoint(tmp_path / "theirs", NSA, name="test")
    state = convert_weights(foreign, seed=0)
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    folder = export_model(tmp_path / "ours", foreign.config, state)
    hf.register()
    opened = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(opened, hf.NsaForCausalLM)
    opened.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = load_model(tmp_path / "again", dtype=dtype)
    assert again.config == foreign.config
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    exported = export_model(tmp_path / "third", again.config, again.state_dict())
    weights = "model.safetensors"
    assert (exported / weights).read_bytes() == (folder / weights).read_bytes()


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (LlamaConfig(**SIZES, attention_bias=True), "no place for .*o_proj.bias"),
        (LlamaConfig(**SIZES, mlp_bias=True), "no place for .*mlp"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "hidden_act='gelu' must be 'silu'"),
        (MistralConfig(**SIZES, sliding_window=32), "sliding_window=32 must be null"),
        (
            LlamaConfig(
                **SIZES,
                rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
            ),
            "rope_type='yarn' must be",
        ),
    ],
)
def test_what_the_model_would_compute_otherwise_is_refused(tmp_path, config, text):
    foreign_model(config).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=text):
        open_checkpoint(tmp_path, NSA, name="test")


def test_broken_and_foreign_checkpoints_are_named(tmp_path):
    with pytest.raises(
        ConversionError, match=r"has no config\.json; a checkpoint, an exported model too, is"
    ):
        open_checkpoint(tmp_path, NSA, name="test")
    foreign_model(SHAPES["llama"]).save_pretrained(tmp_path, max_shard_size="20KB")
    config = tmp_path / "config.json"
    tree = json.loads(config.read_text())
    config.write_text(json.dumps(tree | {"model_type": "gpt2"}))
    with pytest.raises(ConversionError, match="model_type='gpt2' must be one of llama, mistral"):
        open_checkpoint(tmp_path, NSA, name="test")
    config.write_text(json.dumps(tree | {"num_hidden_layers": 3}))
    with pytest.raises(ConversionError, match=r"has no tensor model\.layers\.2\."):
        open_checkpoint(tmp_path, NSA, name="test")
    config.write_text(json.dumps(tree | {"num_hidden_layers": 1}))
    with pytest.raises(ConversionError, match=r"no place for model\.layers\.1\."):
        open_checkpoint(tmp_path, NSA, name="test")
    config.write_text("{")
    with pytest.raises(ConversionError, match=r"config\.json cannot be read"):
        open_checkpoint(tmp_path, NSA, name="test")
    config.write_text(json.dumps(tree))
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:100])
    with pytest.raises(ConversionError, match=f"{last.name}: is not a whole safetensors file"):
        open_checkpoint(tmp_path, NSA, name="test")
    last.unlink()
    with pytest.raises(ConversionError, match=f"{last.name}: does not exist"):
        open_checkpoint(tmp_path, NSA, name="test")
