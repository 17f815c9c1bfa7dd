"""Layers as the training runs them: compiled, and with what the backward pass recomputes.

What attention has worked out is dear to work out again and small beside the rest of a layer, so
between keeping everything and keeping nothing lies keeping the attention's results. Of its branches
sliding attention is the cheapest: its cost does not grow with the context, and its output is as
large as each of the others.
"""

import functools
from collections.abc import Callable, Iterable
from itertools import cycle
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from nsa_platform.config.train import Recompute
from nsa_platform.model.attention import NsaAttention
from nsa_platform.model.moe import MoeFeedForward
from nsa_platform.model.transformer import Layer

# Results that stay, by name of the op; a layer has those that its kind of attention runs.
_KERNELS = (
    "nsa_kernels::nsa_attention",
    "nsa_kernels::compressed_attention",
    "nsa_kernels::select_blocks",
    "nsa_kernels::selected_attention",
    "nsa_kernels::full_attention",
    # torch's dense kernel, which the training benchmark measures in its place.
    "aten::_scaled_dot_product_cudnn_attention",
)
# What came from other workers is not sent again.
_MESSAGES = (
    "_c10d_functional::all_to_all_single",
    "_c10d_functional::all_gather_into_tensor",
    "_c10d_functional::all_reduce",
    "_c10d_functional::wait_tensor",
)


def recompute_activations(layers: Iterable[Layer], pattern: Iterable[Recompute]) -> None:
    """Say what the backward pass computes again; layers take the modes of `pattern` in turn.

    full: a layer keeps its input alone. selective: also that of its feed-forward and what its
    attention returns. branches: selective, and the sliding branch is computed again; the branches
    run apart for it. A layer with experts always keeps the input of its feed-forward: experts stay
    out of compiled graphs, and attention would follow them out of a region that holds both.
    """
    for layer, mode in zip(layers, cycle(pattern), strict=False):
        if mode == "none":
            continue
        if mode == "full" and not isinstance(layer.ffn, MoeFeedForward):
            layer.forward = _recomputed(layer.forward)
            continue
        layer.attend = (
            _recomputed(layer.attend)
            if mode == "full"
            else _recomputed(layer.attend, context_fn=_contexts)
        )
        # Without the contexts: they cannot see through the gathering of sharded experts.
        layer.feed = _recomputed(layer.feed)
        if mode == "branches" and isinstance(layer.attention, NsaAttention):
            layer.attention.runs_apart = True


def _recomputed(forward: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    return functools.partial(checkpoint, forward, use_reentrant=False, **how)


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """torch.compile each layer's forward; hooks of sharding stay outside."""
    for layer in layers:
        layer.forward = torch.compile(layer.forward)


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op.name().partition(".")[0]
    kept = name in _KERNELS or name in _MESSAGES
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
