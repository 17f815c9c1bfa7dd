"""Toy models: small sizes, every parameter away from the zeros that some of them start at."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsa_platform.config.model import ModelConfig
from nsa_platform.model.transformer import Transformer, init_weights

NSA = {
    "kind": "nsa",
    "query_heads": 4,
    "kv_heads": 2,
    "key_width": 16,
    "value_width": 8,
    "compression_block_size": 8,
    "compression_stride": 4,
    "selection_block_size": 8,
    "num_selected_blocks": 4,
    "window_size": 12,
}
FULL = {"kind": "full", "query_heads": 4, "kv_heads": 2, "key_width": 16, "value_width": 8}
MOBA = {**FULL, "kind": "moba", "selection_block_size": 8, "num_selected_blocks": 3}
MLA = {
    "kind": "mla",
    "query_heads": 4,
    "kv_lora_rank": 12,
    "key_width": 16,
    "rotary_width": 4,
    "value_width": 8,
}
BASES = {"nsa": NSA, "full": FULL, "moba": MOBA, "mla": MLA}


def toy_config(attention: dict[str, Any] | None = None, **fields: Any) -> ModelConfig:
    """A two-layer model; `attention` patches the sizes of its kind, of NSA without one."""
    attention = attention or {}
    base = BASES[attention.get("kind", "nsa")]
    tree = {
        "vocab_size": 61,
        "layers": 2,
        "width": 32,
        "ffn_width": 48,
        "max_context": 256,
        "attention": {**base, **attention},
    }
    return ModelConfig.parse({**tree, **fields})


def toy_model(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A model with a little noise on every parameter."""
    model = Transformer(config)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


@pytest.fixture(scope="session")
def make_config() -> Callable[..., ModelConfig]:
    return toy_config


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Transformer]:
    return toy_model
