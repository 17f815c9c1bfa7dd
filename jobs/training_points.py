"""Points of a training benchmark: which attention at which context, and the run that trains so."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa_platform.config.base import ConfigError
from nsa_platform.config.runs import PretrainRun
from nsa_platform.model import attention as attention_module
from nsa_platform.model.cost import dense_equivalent

ATTENTIONS = ("nsa", "full", "full_sdpa")


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement."""

    attention: str
    """One of ATTENTIONS."""
    context: int
    """Tokens of a row."""
    step_tokens: int
    """Of one step, for each worker that has rows of its own; rounded down to whole microbatches."""
    microbatch_tokens: int
    """That go through the model at once: as many rows as fit, one at least."""


def run_of(run: PretrainRun, point: Point, recompute: str, *, workers: int) -> PretrainRun:
    """The run as it would be trained at this point by so many workers.

    Args:
        recompute: train.activation_checkpointing, the modes of a list joined by commas.

    Raises:
        ConfigError: it cannot be.
    """
    if run.model is None or run.stages or run.model.attention.kind != "nsa":
        raise ConfigError(
            "a training benchmark needs a run with a model of attention.kind=nsa and no stages"
        )
    model = run.model if point.attention == "nsa" else dense_equivalent(run.model)
    rows = max(1, min(point.microbatch_tokens, point.step_tokens) // point.context)
    microbatches = max(1, point.step_tokens // (rows * point.context))
    dealt = max(1, run.train.mesh.data_workers(workers))
    tree = run.model_dump(mode="json")
    tree["model"] = model.model_dump(mode="json")
    tree["data"]["context_length"] = point.context
    tree["train"] |= {
        "sequences_per_microbatch": rows,
        "tokens_per_step": rows * point.context * microbatches * dealt,
        "activation_checkpointing": recompute.split(","),
    }
    tree["cluster"] |= {"num_workers": workers, "min_workers": None}
    return PretrainRun.parse(tree)


@contextmanager
def attention_kernel(attention: str) -> Iterator[None]:
    """Let models with full attention use torch's kernel inside the block, if that is asked for."""
    if attention != "full_sdpa":
        yield
        return
    with mock.patch.object(attention_module, "full_attention", _sdpa):
        yield


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, scale: float) -> Tensor:
    """full_attention for rows of one document each, all of them as long: [T, H, K] -> [T, H, V]."""
    rows = len(cu_seqlens) - 1
    kernel = SDPBackend.CUDNN_ATTENTION if q.is_cuda else SDPBackend.FLASH_ATTENTION
    q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(kernel):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True
        )
    return out.transpose(1, 2).flatten(0, 1)
