"""What the benchmarks run: named shapes, and tensors for them."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.choices import Sharing, shared_blocks, uniform_blocks
from nsa_kernels import NsaConfig, num_compressed_blocks

Choice = Literal["uniform", "real", "none"]
"""Blocks at random; shared by neighbours as in a trained model; or none, for the whole op, which
chooses for itself."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One packed sequence of `tokens` tokens through one attention layer."""

    name: str
    tokens: int
    heads: int = 64
    groups: int = 4
    key_width: int = 128
    value_width: int = 128
    dtype: torch.dtype = torch.bfloat16
    config: NsaConfig = NsaConfig()  # noqa: RUF009  a frozen value
    ops: tuple[str, ...] = ("compressed", "selected", "sliding", "full", "nsa", "choosing")
    """Ops to time; choosing stands for select_blocks, alone and after compressed attention."""
    real_ops: tuple[str, ...] = ("selected", "nsa")
    """Ops to time again with neighbours that choose alike."""
    peers: tuple[str, ...] = ("full", "selected")
    """Ops whose peers are timed."""


def _crossing(name: str, tokens: int) -> Workload:
    """The whole op beside dense attention, nothing else."""
    return Workload(name, tokens, ops=("full", "nsa"), real_ops=("nsa",), peers=("full",))


def _small_groups(name: str, groups: int, peers: tuple[str, ...] = ()) -> Workload:
    return Workload(
        name, 32768, groups=groups, ops=("selected",), real_ops=("selected",), peers=peers
    )


WORKLOADS = (
    Workload("8k", 8192),
    _crossing("10k", 10240),
    _crossing("12k", 12288),
    Workload("16k", 16384),
    Workload("32k", 32768),
    Workload("64k", 65536),
    Workload("16k-k192", 16384, key_width=192),
    Workload("64k-k192", 65536, key_width=192),
    _small_groups("32k-r8", 8),
    _small_groups("32k-r4", 16, peers=("full",)),
    _small_groups("32k-r2", 32),
    _small_groups("32k-r1", 64),
)
LONG = (
    Workload("264k", 270336),
    Workload("1m", 1048576, heads=16, groups=1),
)
"""Forward of the whole op only. The second has a quarter of the heads, so that it fits 80 GB."""
QUICK = ("8k", "16k")
GATE = Workload("gate", 2500, heads=32, groups=2)
"""What is checked against the reference before anything is timed; widths are the workload's, and
so is the number of query heads of a group."""


@dataclass(frozen=True, slots=True)
class Drift:
    """How alike the queries of neighbouring tokens are."""

    share: float
    """Share of a query's variance that it has in common with its neighbours and its group."""
    life: int
    """Tokens after which the common part is another one."""


# Set so that neighbours share blocks as they do in a trained nsa-150m at 64k (RESULTS.md shows
# both); the first for a choice that is given, the second for queries that choose for themselves.
SHARING = Sharing(keep=0.0, home=0.6, home_life=1024, nearness=1.12)
DRIFT = Drift(share=0.2, life=128)


@dataclass(frozen=True, slots=True)
class Tensors:
    """Random inputs of every op for a workload, and the gradient of the output."""

    q: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
    gates: Tensor
    dout: Tensor
    blocks: Tensor


def make_tensors(
    workload: Workload, device: str, seed: int = 0, choice: Choice = "uniform"
) -> Tensors:
    """Normal values. A real choice comes with queries that lead the whole op to a similar one."""
    torch.manual_seed(seed)
    tokens, groups, config = workload.tokens, workload.groups, workload.config
    compressed = num_compressed_blocks(tokens, config)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=workload.dtype, device=device)

    if choice == "uniform":
        blocks = uniform_blocks(tokens, groups, config, device)
    elif choice == "real":
        blocks = shared_blocks(tokens, groups, config, SHARING, device)
    else:
        blocks = torch.empty(0, groups, config.num_selected_blocks, dtype=torch.int32)
    q = (
        drifting_queries(workload, DRIFT, device)
        if choice == "real"
        else draw(tokens, workload.heads, workload.key_width)
    )
    return Tensors(
        q=q,
        k_cmp=draw(compressed, groups, workload.key_width),
        v_cmp=draw(compressed, groups, workload.value_width),
        k_slc=draw(tokens, groups, workload.key_width),
        v_slc=draw(tokens, groups, workload.value_width),
        k_win=draw(tokens, groups, workload.key_width),
        v_win=draw(tokens, groups, workload.value_width),
        gates=torch.rand(tokens, workload.heads, 3, dtype=workload.dtype, device=device),
        dout=draw(tokens, workload.heads, workload.value_width),
        blocks=blocks,
    )


def drifting_queries(workload: Workload, drift: Drift, device: str) -> Tensor:
    """Normal queries [T, H, K] whose neighbours resemble each other, and so choose alike.

    The common part turns from one random direction to the next, a new one each `drift.life`
    tokens, and is the same for all heads of a group; the rest is drawn anew for each query.
    """
    tokens, groups, width = workload.tokens, workload.groups, workload.key_width
    knots = torch.randn(tokens // drift.life + 2, groups, 1, width, device=device)
    token = torch.arange(tokens, device=device)
    knot = token // drift.life
    angle = (token % drift.life / drift.life * (math.pi / 2))[:, None, None, None]
    common = angle.cos() * knots[knot] + angle.sin() * knots[knot + 1]
    own = torch.randn(
        tokens, groups, workload.heads // groups, width, device=device, dtype=workload.dtype
    )
    q = drift.share**0.5 * common.to(workload.dtype) + (1 - drift.share) ** 0.5 * own
    return q.flatten(1, 2)
