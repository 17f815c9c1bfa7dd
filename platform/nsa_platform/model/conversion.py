"""Llama- and Qwen-shaped checkpoints of transformers as models of this platform.

Every branch of NSA starts with the checkpoint's own keys and values, phi starts as the mean, and
the gates start where the configuration puts them. Biases of the projections, norms of queries and
keys and Llama 3.1's rotary frequencies come over; what this platform's model has no place for is
refused by name, so that a converted model never computes something else in silence.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from nsa_platform.config.base import ConfigError
from nsa_platform.config.convert import FullConversion, NsaConversion
from nsa_platform.config.model import FullAttentionConfig, ModelConfig, NsaAttentionConfig
from nsa_platform.model.tensor_files import TensorFileError, TensorFiles
from nsa_platform.model.transformer import Transformer, initial_tensor
from nsa_platform.model.weights import CONFIG_FILE

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class ConversionError(ValueError):
    """A checkpoint cannot become a model of this platform; the message says why."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a tensor of the checkpoint."""

    name: str
    begin: int = 0
    end: int | None = None


Parts = dict[str, tuple[Part, ...]]
"""Each parameter that comes over, and what is laid end to end in it."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """A checkpoint whose every tensor has a place in `config`'s model."""

    config: ModelConfig
    files: TensorFiles
    parts: Parts


def open_checkpoint(
    folder: Path,
    attention: NsaConversion | FullConversion,
    *,
    name: str,
    max_context: int | None = None,
) -> Foreign:
    """Read the sizes of a checkpoint and check that the model can hold all of it.

    Raises:
        ConversionError: no checkpoint is there, it is of another architecture, it computes
            something that this platform's model does not, or a tensor is missing.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ConversionError(
            f"{folder}: has no {CONFIG_FILE}; a checkpoint, an exported model too, is a folder "
            f"with {CONFIG_FILE}, safetensors and the tokenizer's files"
        )
    try:
        files = TensorFiles(folder)
    except TensorFileError as error:
        raise ConversionError(f"{error} (only safetensors are read)") from None
    try:
        source = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConversionError(f"{folder}: config.json cannot be read: {reason}") from None
    _check_architecture(source, folder)
    tree = _model_tree(source, attention, files)
    config = parse_config(tree, folder, name=name, max_context=max_context)
    parts = {
        parameter: tuple(Part(tensor) for tensor in tensors)
        for parameter, tensors in _sources(config)
    }
    _check_tensors(files, config, parts, folder)
    return Foreign(config, files, parts)


def convert_weights(foreign: Foreign, *, seed: int) -> dict[str, Tensor]:
    """All parameters of Transformer(foreign.config) by name, in the checkpoint's own type."""
    config, files = foreign.config, foreign.files
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    state = {
        name: torch.cat([files.tensor(part.name)[part.begin : part.end] for part in parts])
        for name, parts in foreign.parts.items()
    }
    dtype = state["embedding.weight"].dtype
    for name, shape in shapes.items():
        if name not in state:
            state[name] = initial_tensor(config, name, shape, seed=seed).to(dtype)
    return state


def parse_config(
    tree: dict[str, Any], folder: Path, *, name: str, max_context: int | None
) -> ModelConfig:
    """The config of what a checkpoint becomes, of its own context where none is asked for.

    Raises:
        ConversionError: the sizes do not fit.
    """
    tree = tree | {"name": name}
    if max_context is not None:
        tree["max_context"] = max_context
    try:
        config = ModelConfig.parse(tree, source=str(folder))
    except ConfigError as error:
        raise ConversionError(str(error)) from None
    _check_context(config)
    return config


def _check_context(config: ModelConfig) -> None:
    """Raises ConversionError where not even the blocks that are always read fit into a context."""
    attention = config.attention
    if not isinstance(attention, NsaAttentionConfig):
        return
    blocks = attention.num_initial_blocks + attention.num_local_blocks
    least = blocks * attention.selection_block_size
    if config.max_context < least:
        raise ConversionError(
            f"max_context={config.max_context} must be at least {least}: the {blocks} blocks of "
            f"{attention.selection_block_size} tokens that every query reads (num_initial_blocks "
            "and num_local_blocks of selection_block_size)"
        )


def _check_architecture(source: PreTrainedConfig, folder: Path) -> None:
    kind = source.model_type
    if kind not in MODEL_TYPES:
        raise ConversionError(
            f"{folder}: model_type={kind!r} must be one of {', '.join(MODEL_TYPES)}"
        )
    rope = _rope(source)
    layers = set(getattr(source, "layer_types", None) or ["full_attention"])
    problems = {
        f"hidden_act={source.hidden_act!r} must be 'silu'": source.hidden_act != "silu",
        f"rope_type={rope['rope_type']!r} must be 'default' or 'llama3' (others, yarn among them, "
        "are computed otherwise there)": rope["rope_type"] not in ("default", "llama3"),
        f"partial_rotary_factor={rope.get('partial_rotary_factor')} must be 1": (
            rope.get("partial_rotary_factor") or 1
        )
        != 1,
        f"layer_types={sorted(layers)} must all be full_attention": layers != {"full_attention"},
        f"sliding_window={getattr(source, 'sliding_window', None)} must be null": (
            getattr(source, "sliding_window", None) is not None
        ),
    }
    found = [problem for problem, applies in problems.items() if applies]
    if found:
        raise ConversionError(f"{folder}: {'; '.join(found)}")


def _model_tree(
    source: PreTrainedConfig, attention: NsaConversion | FullConversion, files: TensorFiles
) -> dict[str, Any]:
    """The ModelConfig of the converted model, as a plain tree."""
    heads = source.num_attention_heads
    head_width = getattr(source, "head_dim", None) or source.hidden_size // heads
    first = "model.layers.0.self_attn."
    sizes = {
        "query_heads": heads,
        "kv_heads": source.num_key_value_heads,
        "key_width": head_width,
        "value_width": head_width,
        "qkv_bias": f"{first}q_proj.bias" in files.shapes,
        "qk_norm": f"{first}q_norm.weight" in files.shapes,
    }
    rope = _rope(source)
    yarn = None
    if rope["rope_type"] == "llama3":
        yarn = {
            "factor": rope["factor"],
            "original_context": rope["original_max_position_embeddings"],
            "beta_fast": rope["high_freq_factor"],
            "beta_slow": rope["low_freq_factor"],
            "attention_factor": 1.0,
        }
    return {
        "vocab_size": source.vocab_size,
        "layers": source.num_hidden_layers,
        "width": source.hidden_size,
        "ffn_width": source.intermediate_size,
        "max_context": source.max_position_embeddings,
        "attention": sizes | attention.model_dump(),
        "rope_base": rope["rope_theta"],
        "yarn": yarn,
        "norm_eps": source.rms_norm_eps,
        "tie_embeddings": source.tie_word_embeddings,
    }


def _rope(source: PreTrainedConfig) -> dict[str, Any]:
    return {"rope_type": "default", **(getattr(source, "rope_parameters", None) or {})}


def _check_tensors(files: TensorFiles, config: ModelConfig, parts: Parts, folder: Path) -> None:
    """Every tensor of the checkpoint must have a place, and every place its tensor."""
    wanted = {part.name for each in parts.values() for part in each}
    missing = [name for name in sorted(wanted) if name not in files.shapes]
    left = [name for name in files.shapes if name not in wanted and not _is_derived(name)]
    # A tied checkpoint may hold its one table twice.
    if (
        config.tie_embeddings
        and HEAD in left
        and torch.equal(files.tensor(HEAD), files.tensor(EMBEDDING))
    ):
        left.remove(HEAD)
    if missing:
        raise ConversionError(f"{folder}: has no tensor {_some(missing)}")
    if left:
        raise ConversionError(f"{folder}: the model has no place for {_some(left)}")


def _is_derived(name: str) -> bool:
    """Whether a tensor holds nothing of its own: rotary frequencies, which old files carry."""
    return name.endswith("rotary_emb.inv_freq")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def copies_of_keys(config: ModelConfig) -> int:
    """How often a model's projection has the keys of a checkpoint, and then the values: once for
    each branch that has its own."""
    attention = config.attention
    assert isinstance(attention, NsaAttentionConfig | FullAttentionConfig)
    return 3 if attention.kind == "nsa" and attention.branch_kv == "separate" else 1


def _sources(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each parameter that comes over, and the checkpoint's tensors that are laid end to end in it.

    Keys and values of the branches lie in one projection: the keys of all branches, then the
    values of all branches.
    """
    attention = config.attention
    assert isinstance(attention, NsaAttentionConfig | FullAttentionConfig)
    branches = copies_of_keys(config)
    kinds = ("weight", "bias") if attention.qkv_bias else ("weight",)
    yield "embedding.weight", (EMBEDDING,)
    yield "norm.weight", ("model.norm.weight",)
    if not config.tie_embeddings:
        yield "head.weight", (HEAD,)
    for index in range(config.layers):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        yield f"{ours}.attention_norm.weight", (f"{theirs}.input_layernorm.weight",)
        yield f"{ours}.ffn_norm.weight", (f"{theirs}.post_attention_layernorm.weight",)
        for kind in kinds:
            yield f"{ours}.attention.query.{kind}", (f"{theirs}.self_attn.q_proj.{kind}",)
            keys = (f"{theirs}.self_attn.k_proj.{kind}",) * branches
            values = (f"{theirs}.self_attn.v_proj.{kind}",) * branches
            yield f"{ours}.attention.key_value.{kind}", keys + values
        if attention.qk_norm:
            yield f"{ours}.attention.query_norm.weight", (f"{theirs}.self_attn.q_norm.weight",)
            yield f"{ours}.attention.key_norm.weight", (f"{theirs}.self_attn.k_norm.weight",)
        yield f"{ours}.attention.output.weight", (f"{theirs}.self_attn.o_proj.weight",)
        gate_up = (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight")
        yield f"{ours}.ffn.gate_up.weight", gate_up
        yield f"{ours}.ffn.down.weight", (f"{theirs}.mlp.down_proj.weight",)
