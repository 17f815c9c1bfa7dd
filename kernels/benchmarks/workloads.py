"""What the benchmarks run: named shapes, their tensors, and the work they hold."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_kernels import NsaConfig, num_compressed_blocks


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


WORKLOADS = (
    Workload("8k", 8192),
    Workload("16k", 16384),
    Workload("32k", 32768),
    Workload("64k", 65536),
    Workload("16k-k192", 16384, key_width=192),
)
QUICK = ("8k", "16k")
GATE = Workload("gate", 1100, heads=32, groups=2)
"""What is checked against the reference before anything is timed; widths are the workload's."""


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


def make_tensors(workload: Workload, device: str, seed: int = 0) -> Tensors:
    """Normal values, and blocks chosen uniformly at random beside the forced ones."""
    torch.manual_seed(seed)
    tokens, groups = workload.tokens, workload.groups
    compressed = num_compressed_blocks(tokens, workload.config)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=workload.dtype, device=device)

    return Tensors(
        q=draw(tokens, workload.heads, workload.key_width),
        k_cmp=draw(compressed, groups, workload.key_width),
        v_cmp=draw(compressed, groups, workload.value_width),
        k_slc=draw(tokens, groups, workload.key_width),
        v_slc=draw(tokens, groups, workload.value_width),
        k_win=draw(tokens, groups, workload.key_width),
        v_win=draw(tokens, groups, workload.value_width),
        gates=torch.rand(tokens, workload.heads, 3, dtype=workload.dtype, device=device),
        dout=draw(tokens, workload.heads, workload.value_width),
        blocks=random_blocks(workload, device),
    )


def random_blocks(workload: Workload, device: str, rows_at_once: int = 4096) -> Tensor:
    """int32 [T, G, n], ascending, -1 last: forced blocks, the rest uniform among earlier ones.

    Neighbouring queries share only the forced blocks. Trained models share more, which is faster.
    """
    config = workload.config
    num_blocks = -(-workload.tokens // config.selection_block_size)
    block = torch.arange(num_blocks, device=device)
    chosen = min(config.num_selected_blocks, num_blocks)
    result = torch.full(
        (workload.tokens, workload.groups, config.num_selected_blocks),
        -1,
        dtype=torch.int32,
        device=device,
    )
    for first in range(0, workload.tokens, rows_at_once):
        rows = torch.arange(first, min(first + rows_at_once, workload.tokens), device=device)
        own = (rows // config.selection_block_size)[:, None, None]
        noise = torch.rand(len(rows), workload.groups, num_blocks, device=device)
        is_forced = (block < config.num_initial_blocks) | (block > own - config.num_local_blocks)
        noise = noise.masked_fill(is_forced, 2.0).masked_fill(block > own, -1.0)
        value, index = noise.topk(chosen, dim=-1)
        index = index.masked_fill(value < 0, num_blocks).sort(-1).values
        result[first : first + len(rows), :, :chosen] = index.masked_fill(index == num_blocks, -1)
    return result


def attended_pairs(workload: Workload, op: str, blocks: Tensor) -> float:
    """(query, key) pairs that one head attends to: the least work of an exact kernel."""
    config, t = workload.config, torch.arange(workload.tokens, dtype=torch.float64)
    if op == "full":
        return float((t + 1).sum())
    if op == "sliding":
        return float((t + 1).clamp(max=config.window_size).sum())
    if op == "compressed":
        past = t + 1 - config.compression_block_size
        return float((past.div(config.compression_stride).floor() + 1).clamp(min=0).sum())
    if op == "selected":
        width = config.selection_block_size
        past = t.to(blocks.device)[:, None, None] + 1 - blocks * width
        pairs = past.clamp(min=0, max=width).masked_fill(blocks < 0, 0)
        return float(pairs.sum()) / workload.groups
    if op == "nsa":
        branches = ("compressed", "selected", "sliding")
        return sum(attended_pairs(workload, branch, blocks) for branch in branches)
    raise ValueError(f"op={op!r} is not compressed, selected, sliding, full or nsa")


def attention_flops(workload: Workload, direction: str, pairs: float) -> float:
    """Two products forward (q.k, p.v), five backward (those of q.k, dout.v, dq, dk, dv).

    The score pass that choosing blocks repeats is not counted: it is no part of the result.
    """
    k, v = workload.key_width, workload.value_width
    widths = k + v if direction == "forward" else 3 * k + 2 * v
    return 2.0 * widths * workload.heads * pairs
