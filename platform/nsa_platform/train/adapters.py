"""LoRA in a run: adapters beside a model's weights, in a file of their own, and merged."""

import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from nsa_platform import storage
from nsa_platform.config.lora import LoraConfig, Saved
from nsa_platform.config.model import ModelConfig
from nsa_platform.model.attention import FullAttention, NsaAttention
from nsa_platform.model.cost import flops_per_token
from nsa_platform.model.layers import SwiGlu
from nsa_platform.model.lora import LoraLinear
from nsa_platform.model.mla import MlaAttention
from nsa_platform.model.transformer import Transformer
from nsa_platform.retry import retried
from nsa_platform.train.parallel import World

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"

# Parameters that each word of modules_to_save stands for, by name.
SAVED: Mapping[Saved, tuple[str, ...]] = {
    "gate": ("*.attention.gate.*",),
    "compression": ("*.attention.compress_*",),
    "norm": ("*norm.weight",),
    "embedding": ("embedding.weight", "head.weight"),
}


def adapt(model: Transformer, config: LoraConfig) -> None:
    """Freeze the model, put adapters beside its targets and leave modules_to_save trainable.

    The adapters are undefined until somebody fills them.
    """
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, sections in _projections(module).items():
            if name in config.target_modules:
                adapted = LoraLinear(
                    getattr(module, name),
                    sections,
                    rank=config.rank,
                    alpha=config.alpha,
                    dropout=config.dropout,
                )
                setattr(module, name, adapted)
    patterns = [pattern for word in config.modules_to_save for pattern in SAVED[word]]
    for name, parameter in model.named_parameters():
        if any(fnmatch(name, pattern) for pattern in patterns):
            parameter.requires_grad_(True)


def _projections(module: nn.Module) -> dict[str, list[int]]:
    """The linear layers of attention or of SwiGLU: their outputs by the projections they hold."""
    if isinstance(module, SwiGlu):
        return {"gate_up": [module.hidden_width] * 2, "down": [module.down.out_features]}
    if isinstance(module, MlaAttention):
        return {
            "query": [module.query.out_features],
            "key_value": module.widths,
            "output": [module.output.out_features],
        }
    if not isinstance(module, NsaAttention | FullAttention):
        return {}
    heads = module.config
    widths = heads.kv_heads * heads.key_width, heads.kv_heads * heads.value_width
    branches = module.key_value.out_features // sum(widths)
    return {
        "query": [module.query.out_features],
        "key_value": [widths[0]] * branches + [widths[1]] * branches,
        "output": [module.output.out_features],
    }


def count_trainable(model: ModelConfig, config: LoraConfig) -> int:
    """Parameters that a run with adapters trains."""
    return sum(_trainable(model, config).values())


def _trainable(model: ModelConfig, config: LoraConfig) -> dict[str, int]:
    """Their numbers by name."""
    with torch.device("meta"):
        built = Transformer(model)
        adapt(built, config)
    return {name: p.numel() for name, p in built.named_parameters() if p.requires_grad}


def training_flops(model: ModelConfig, config: LoraConfig | None, context: int) -> float:
    """FLOPs of forward and backward of one token of sequences of `context` tokens, as executed."""
    flops = flops_per_token(model, context)
    if config is None:
        return flops.training
    trainable = _trainable(model, config)
    head = "embedding.weight" if model.tie_embeddings else "head.weight"
    return flops.adapting(
        sum(size for name, size in trainable.items() if "lora_" in name),
        in_full=sum(s for name, s in trainable.items() if name == head or ".gate.weight" in name),
        with_phi="compression" in config.modules_to_save,
    )


def merged(model: Transformer, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole weights by name, with adapters, as those of the plain model that computes the same."""
    plain = dict(weights)
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            names = {part: f"{name}.{part}" for part in ("weight", "lora_A", "lora_B")}
            parts = {part: plain.pop(whole) for part, whole in names.items()}
            plain[names["weight"]] = module.merged(parts)
    return plain


def save_adapter(
    model: Transformer,
    folder: str,
    *,
    about: Mapping[str, Any],
    world: World,
    say: Callable[[str], None],
) -> None:
    """Write what was trained, and `about` it, to a folder, local or s3://. All workers call it.

    Tensors have their names in the adapted model: `layers.0.attention.query.lora_A`, and of
    modules_to_save as in the plain one.

    Raises:
        OSError: it could not be written; on the first worker.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    if not world.is_first:
        return
    tensors = {name: value.contiguous() for name, value in state.items() if torch.is_tensor(value)}

    def write() -> None:
        place = storage.join(folder, ADAPTER_FILE)
        storage.write_bytes(place, save(tensors, metadata={"format": "pt"}))
        text = json.dumps(about, indent=2) + "\n"
        storage.write_text(storage.join(folder, ADAPTER_CONFIG_FILE), text)

    retried(write, f"writing the adapter to {folder}", say=say)
