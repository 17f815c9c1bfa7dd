"""The transformer, top to bottom: embedding, pre-norm layers, norm, logits.

Tokens of all sequences lie packed on one axis T; there is no batch axis. Training and serving run
the same modules and differ in one argument: PackedInputs or PagedInputs. PolicyInputs have somebody
else attend.
"""

import hashlib
import math
from contextlib import nullcontext
from fnmatch import fnmatch
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nsa_platform.config.model import (
    FullAttentionConfig,
    MlaAttentionConfig,
    MobaAttentionConfig,
    ModelConfig,
    NsaAttentionConfig,
)
from nsa_platform.model.attention import FullAttention, NsaAttention
from nsa_platform.model.cache import LayerCache
from nsa_platform.model.inputs import PackedInputs, PagedInputs, PolicyInputs
from nsa_platform.model.layers import SwiGlu
from nsa_platform.model.mla import MlaAttention
from nsa_platform.model.moba import MobaAttention
from nsa_platform.model.moe import MoeFeedForward
from nsa_platform.model.partition import WHOLE
from nsa_platform.model.step import PackedStep, PagedStep, PolicyStep, packed_step, paged_step


class Output(NamedTuple):
    """What a forward pass returns."""

    hidden: Tensor
    """[T, D], normed: ready for Transformer.logits."""
    balance_loss: Tensor
    """Scalar to add to the loss: the experts' load-balance losses, weighted by
    moe.balance_loss, a mean over this pass's tokens, summed over layers. 0 without experts."""
    expert_load: Tensor
    """int64 [layers with experts, experts]: how many of this worker's tokens chose each; without
    experts it is empty."""


def _attention(config: ModelConfig, index: int) -> NsaAttention | FullAttention | MlaAttention:
    attention = config.attention
    match attention:
        case NsaAttentionConfig():
            return NsaAttention(config, attention, layer_index=index)
        case MlaAttentionConfig():
            return MlaAttention(config, attention)
        case MobaAttentionConfig():
            return MobaAttention(config, attention, layer_index=index)
        case FullAttentionConfig():
            return FullAttention(config, attention, layer_index=index)


class Layer(nn.Module):
    """Attention and feed-forward, each on the normed residual stream."""

    def __init__(self, config: ModelConfig, *, index: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.attention = _attention(config, index)
        self.ffn_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.ffn = (
            SwiGlu(config.width, config.ffn_width)
            if config.moe is None or index < config.moe.dense_layers
            else MoeFeedForward(config.width, config.moe)
        )

    def forward(self, x: Tensor, step: PackedStep | PolicyStep) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D] -> x [T, D], this layer's balance loss, a scalar, and its experts' load, int64
        [experts], empty for a dense layer."""
        return self.feed(self.attend(x, step), step)

    def extend(self, x: Tensor, step: PagedStep, cache: LayerCache) -> Tensor:
        """x [T, D] -> x [T, D] for new tokens of sequences that the cache holds."""
        x = self.attention.added_to(x, self.attention_norm, step, cache)
        if isinstance(self.ffn, SwiGlu):
            return self.ffn.added_to(x, self.ffn_norm, step.tallies)
        return x + self.ffn(self.ffn_norm(x))[0]

    def attend(self, x: Tensor, step: PackedStep | PolicyStep) -> Tensor:
        """The first half: x [T, D] and what attention adds to it."""
        return x + self.attention(self.attention_norm(x), step)

    def feed(self, x: Tensor, step: PackedStep | PolicyStep) -> tuple[Tensor, Tensor, Tensor]:
        """The second half: what forward returns, for x [T, D] after attention."""
        normed = self.ffn_norm(x)
        partition = step.partition if isinstance(step, PackedStep) else WHOLE
        if isinstance(self.ffn, MoeFeedForward):
            change, balance_loss, load = self.ffn(normed, partition)
        else:
            change, balance_loss = self.ffn(normed, partition), x.new_zeros(())
            load = x.new_zeros(0, dtype=torch.int64)
        return x + change, balance_loss, load


class Transformer(nn.Module):
    """A language model. Its weights are undefined until init_weights or a checkpoint fills them.

    It may be built on the meta device: it holds parameters and no buffers.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config, index=index) for index in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.head = (
            None
            if config.tie_embeddings
            else nn.Linear(config.width, config.vocab_size, bias=False)
        )

    def forward(self, ids: Tensor, inputs: PackedInputs | PagedInputs | PolicyInputs) -> Output:
        """Hidden states of token ids, int64 [T]. With PagedInputs the caches are written too.

        Raises:
            ValueError: PolicyInputs for a model without full attention.
        """
        x = self.embedding(ids)
        if isinstance(inputs, PagedInputs):
            return self._extend(x, inputs)
        if isinstance(inputs, PackedInputs):
            step = packed_step(inputs, self.config, dtype=x.dtype)
        elif self.config.attention.kind == "full":
            step = PolicyStep(inputs.attend)
        else:
            raise ValueError(
                "policies over keys and values need a model with attention.kind=full, "
                f"got {self.config.attention.kind}"
            )
        balance_loss = torch.zeros((), dtype=torch.float32, device=x.device)
        loads: list[Tensor] = []
        # A probe is read and written in Python: compiled layers run uncompiled with one.
        is_probed = isinstance(step, PackedStep) and step.probe is not None
        with torch.compiler.set_stance("force_eager") if is_probed else nullcontext():
            for layer in self.layers:
                x, layer_loss, load = layer(x, step)
                balance_loss = balance_loss + layer_loss
                if load.numel():
                    loads.append(load)
        expert_load = torch.stack(loads) if loads else ids.new_zeros(0, 0)
        return Output(self.norm(x), balance_loss, expert_load)

    def _extend(self, x: Tensor, inputs: PagedInputs) -> Output:
        """What new tokens give, x [T, D] after the embedding: no loss, no count of experts."""
        step = paged_step(inputs, self.config, dtype=x.dtype)
        for layer, cache in zip(self.layers, inputs.caches, strict=True):
            assert isinstance(layer, Layer)
            x = layer.extend(x, step, cache)
        return Output(self.norm(x), x.new_zeros(()), step.cu_seqlens.new_zeros(0, 0))

    def steer_experts(self, load: Tensor) -> None:
        """Move the biases of the experts' choice after a step; nothing where there are none.

        Args:
            load: int64 [layers with experts, experts], tokens of the step over all workers.
        """
        if self.config.moe is None or not self.config.moe.bias_update_rate:
            return
        mixtures = [m for m in self.modules() if isinstance(m, MoeFeedForward)]
        for mixture, counts in zip(mixtures, load, strict=True):
            mixture.steer(counts)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token: hidden [..., D] -> [..., vocab_size]."""
        return nn.functional.linear(hidden, self.output_weight)

    @property
    def output_weight(self) -> Tensor:
        """[vocab_size, D], the output head's, which may be the embedding's."""
        return self.embedding.weight if self.head is None else self.head.weight


# What each kind of parameter starts with, first match wins; the paper says nothing of it.
# fan_in: normal with deviation 1 / sqrt(inputs). Inputs are axis 1, both of a linear layer
# [out, in] and of a stack [experts or groups, in, out]. residual: fan_in / sqrt(2 * layers), so
# that the residual stream keeps its scale with depth. fold: the mean for phi=linear, else fan_in.
INIT = (
    ("*norm.weight", "ones"),
    ("*.gate.weight", "zeros"),
    ("*.attention.gate.bias", "gate_bias"),
    ("*.query.bias", "zeros"),
    ("*.key_value.bias", "zeros"),
    ("*.compress_*.position", "zeros"),
    ("*.compress_*.fold", "fold"),
    ("*.compress_*.correct", "zeros"),
    ("*.output.weight", "residual"),
    ("*.shared.down.weight", "residual"),
    ("*.ffn.down.weight", "residual"),
    ("*.experts.down", "residual"),
    ("*.balance_bias", "zeros"),
    ("*.lora_B", "zeros"),
    ("*", "fan_in"),
)


def init_weights(model: Transformer, seed: int) -> None:
    """Fill every parameter. The same seed gives the same weights on any device."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_tensor(model.config, name, parameter.shape, seed=seed))


def initial_tensor(
    config: ModelConfig, name: str, shape: tuple[int, ...] | torch.Size, *, seed: int
) -> Tensor:
    """Initial fp32 CPU value of the parameter of this name and full shape.

    It depends on nothing else: each parameter has its own generator, so that sharded weights can
    be filled in any order on any number of workers.
    """
    rule = next(rule for pattern, rule in INIT if fnmatch(name, pattern))
    if rule in ("ones", "zeros"):
        return torch.full(shape, float(rule == "ones"))
    if rule == "gate_bias":
        return _gate_bias(config, shape[0])
    if rule == "fold":
        attention = config.attention
        assert isinstance(attention, NsaAttentionConfig)
        if attention.compression == "linear":
            return _mean_fold(shape, attention.compression_block_size)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    std = shape[1] ** -0.5
    if rule == "residual":
        std /= math.sqrt(2 * config.layers)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _gate_bias(config: ModelConfig, size: int) -> Tensor:
    attention = config.attention
    if not isinstance(attention, NsaAttentionConfig):
        return torch.zeros(size)
    return torch.tensor(attention.gate_bias).repeat(attention.query_heads)


def _mean_fold(shape: tuple[int, ...] | torch.Size, block_size: int) -> Tensor:
    groups, _, width = shape
    return (torch.eye(width) / block_size).repeat(groups, block_size, 1)
