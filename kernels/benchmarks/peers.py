"""Attention of others: torch's kernels, and fla's and FlashAttention-4's where installed."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.workloads import Tensors
from nsa_kernels import NsaConfig

Attention = Callable[[], Tensor]
Build = Callable[[Tensors, NsaConfig], tuple[Attention, list[Tensor], Tensor]]
"""From a workload's tensors: the call, its differentiable inputs, and the output's gradient."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A kernel that computes what one of our ops computes."""

    name: str
    op: str
    """full or selected: whose work it does."""
    build: Build


def _sdpa(kernel: SDPBackend) -> Build:
    def build(tensors: Tensors, config: NsaConfig) -> tuple[Attention, list[Tensor], Tensor]:
        # [1, H, T, K], the layout that torch's kernels want; grouped keys stay grouped.
        q, k, v = (x.transpose(0, 1)[None] for x in (tensors.q, tensors.k_win, tensors.v_win))

        def attend() -> Tensor:
            with sdpa_kernel(kernel):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                )

        return attend, [q, k, v], tensors.dout.transpose(0, 1)[None]

    return build


def _flash_attention_4(module: Any) -> Build:
    def build(tensors: Tensors, config: NsaConfig) -> tuple[Attention, list[Tensor], Tensor]:
        inputs = [x[None] for x in (tensors.q, tensors.k_win, tensors.v_win)]

        def attend() -> Tensor:
            result = module.flash_attn_func(*inputs, causal=True)
            return result[0] if isinstance(result, tuple) else result

        return attend, inputs, tensors.dout[None]

    return build


def _fla_selected(module: Any) -> Build:
    def build(tensors: Tensors, config: NsaConfig) -> tuple[Attention, list[Tensor], Tensor]:
        inputs = [x[None] for x in (tensors.q, tensors.k_slc, tensors.v_slc)]
        blocks = tensors.blocks[None].long()

        def attend() -> Tensor:
            return module.parallel_nsa(
                *inputs,
                block_indices=blocks,
                block_counts=config.num_selected_blocks,
                block_size=config.selection_block_size,
            )

        return attend, inputs, tensors.dout[None]

    return build


TORCH = (
    Peer("sdpa_flash", "full", _sdpa(SDPBackend.FLASH_ATTENTION)),
    Peer("sdpa_cudnn", "full", _sdpa(SDPBackend.CUDNN_ATTENTION)),
)
OTHERS = (
    ("flash_attn_4", "full", "flash_attn.cute", _flash_attention_4),
    ("fla_selected", "selected", "fla.ops.nsa.parallel", _fla_selected),
)


def installed_peers() -> Iterator[Peer]:
    """torch's kernels and those of the other libraries that this machine has."""
    yield from TORCH
    for name, op, module, build in OTHERS:
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            print(f"{name}: left out, not installed ({error})", flush=True)
            continue
        yield Peer(name, op, build(found))
