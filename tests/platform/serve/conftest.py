"""Toy models for generation: small blocks and windows, so that a few tokens cross every border."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsa_platform.config.model import ModelConfig
from nsa_platform.data.tokenizer import Tokenizer, train_tokenizer
from nsa_platform.model.transformer import Transformer, init_weights

HEADS = {"query_heads": 4, "kv_heads": 2, "key_width": 16, "value_width": 8}
NSA = {
    "kind": "nsa",
    "compression_block_size": 8,
    "compression_stride": 4,
    "selection_block_size": 8,
    "num_selected_blocks": 3,
    "num_local_blocks": 1,
    "window_size": 12,
}


def toy_model(
    attention: dict[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> Transformer:
    """A two-layer model with noise on every parameter; `attention` patches the NSA sizes."""
    attention = attention or {}
    kind = attention.get("kind", "nsa")
    sizes = attention if kind != "nsa" else {**NSA, **attention}
    heads = {"query_heads": 4} if kind == "mla" else HEADS
    tree = {
        "vocab_size": 61,
        "layers": 2,
        "width": 32,
        "ffn_width": 48,
        "max_context": 128,
        "attention": {**heads, **sizes},
        **fields,
    }
    model = Transformer(ModelConfig.parse(tree))
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Transformer]:
    return toy_model


@pytest.fixture(scope="session")
def toy_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes, four control tokens and some words; characters of other scripts take several ids."""
    texts = ["the cat sat on the mat and the dog sat on the log", "naïve café, 北京 and Ελλάδα 🙂"]
    return train_tokenizer(texts * 3, 300, tmp_path_factory.mktemp("toy-tokenizer"))


@pytest.fixture(scope="session")
def make_speaker(toy_tokenizer: Tokenizer) -> Callable[..., Transformer]:
    """toy_model with the vocabulary of toy_tokenizer; untied, for tied ones repeat themselves."""

    def make(attention: dict[str, Any] | None = None, **fields: Any) -> Transformer:
        fields = {"vocab_size": toy_tokenizer.vocab_size, "tie_embeddings": False, **fields}
        return toy_model(attention, **fields).requires_grad_(False)

    return make
