"""The least work of each op: products, and bytes that must cross the device's memory."""

import torch

from benchmarks.workloads import Workload
from nsa_kernels import num_compressed_blocks

BRANCHES = ("compressed", "selected", "sliding")


def attended_pairs(workload: Workload, op: str) -> float:
    """(query, key) pairs that one head attends to.

    Selected attention sees as many for any choice: every chosen block but the query's own lies
    whole in its past.
    """
    config, t = workload.config, torch.arange(workload.tokens, dtype=torch.float64)
    if op == "full":
        return float((t + 1).sum())
    if op == "sliding":
        return float((t + 1).clamp(max=config.window_size).sum())
    if op == "compressed":
        past = t + 1 - config.compression_block_size
        return float((past.div(config.compression_stride).floor() + 1).clamp(min=0).sum())
    if op == "selected":
        size = config.selection_block_size
        earlier = t.div(size).floor().clamp(max=config.num_selected_blocks - 1)
        return float((earlier * size + t.remainder(size) + 1).sum())
    if op == "nsa":
        return sum(attended_pairs(workload, branch) for branch in BRANCHES)
    raise ValueError(f"op={op!r} is not compressed, selected, sliding, full or nsa")


def least_flops(workload: Workload, op: str, direction: str) -> float:
    """Two products forward (q.k, p.v), five backward (those of q.k, dout.v, dq, dk, dv).

    Choosing blocks from a known lse is one product. Together with compressed attention, and in the
    whole op, it counts nothing: its scores are those of that branch, and computing them twice is
    a kernel's business, not the result's.
    """
    k, v = workload.key_width, workload.value_width
    if op == "select_blocks":
        return 2.0 * k * workload.heads * attended_pairs(workload, "compressed")
    widths = k + v if direction == "forward" else 3 * k + 2 * v
    attended = "compressed" if op == "compress_and_select" else op
    return 2.0 * widths * workload.heads * attended_pairs(workload, attended)


def least_bytes(workload: Workload, op: str, direction: str) -> float:
    """Every input read once and every output written once; backward also reads out and lse."""
    tokens, heads, groups = workload.tokens, workload.heads, workload.groups
    item = workload.dtype.itemsize
    keys_values = groups * (workload.key_width + workload.value_width) * item
    q, out = (tokens * heads * width * item for width in (workload.key_width, workload.value_width))
    lse = tokens * heads * 4
    chosen = tokens * groups * workload.config.num_selected_blocks * 4
    gates = tokens * heads * 3 * item
    compressed = num_compressed_blocks(tokens, workload.config)
    if op == "select_blocks":
        return q + compressed * groups * workload.key_width * item + lse + chosen
    rows = {
        "compressed": compressed,
        "compress_and_select": compressed,
        "nsa": compressed + 2 * tokens,
    }.get(op, tokens)
    extra = {"selected": chosen, "compress_and_select": chosen, "nsa": gates}.get(op, 0)
    branches = len(BRANCHES) if op == "nsa" else 1
    if direction == "forward":
        return q + rows * keys_values + extra + out + (lse if op in BRANCHES else 0)
    gradients = q + rows * keys_values + (gates if op == "nsa" else 0)
    return q + rows * keys_values + extra + 2 * out + branches * lse + gradients
