"""Records of one workload: times of our ops and of their peers, forward and backward."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

import nsa_kernels
from benchmarks.counting import least_bytes, least_flops
from benchmarks.exact import ROWS, spot_error
from benchmarks.gate import MAX_ERROR, RedGate, op_output, op_tensors
from benchmarks.overlap import measure_overlap
from benchmarks.peers import TORCH, Peer
from benchmarks.timing import median_ms, once_ms
from benchmarks.workloads import DRIFT, SHARING, Choice, Tensors, Workload, make_tensors

Record = dict[str, Any]


def ceilings(device: str, size: int = 8192, copied: int = 2**30) -> Iterator[Record]:
    """bf16 matrix products and memory copies: what the kernels could reach at most."""
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    ms = median_ms(lambda: a @ a)
    yield {"name": "ceiling/matmul", "value": 2 * size**3 / ms / 1e9, "unit": "TFLOP/s"}
    big = torch.empty(copied, dtype=torch.uint8, device=device)
    ms = median_ms(big.clone)
    yield {"name": "ceiling/copy", "value": 2 * copied / ms / 1e9, "unit": "TB/s"}


def our_ops(workload: Workload, device: str, rep_ms: int, choice: Choice) -> Iterator[Record]:
    """The workload's ops with this choice of blocks; a real one is told by the op's name."""
    tensors = make_tensors(workload, device, choice=choice)
    config, suffix = workload.config, "_real" if choice == "real" else ""
    ops = workload.real_ops if choice == "real" else workload.ops
    for op in (op for op in ops if op != "choosing"):
        inputs = op_tensors(op, tensors)

        def attend(op: str = op, inputs: list[Tensor] = inputs) -> Tensor:
            return op_output(nsa_kernels, op, inputs, tensors.blocks, config)

        if op in ROWS:
            with torch.no_grad():
                _check_rows(workload, op, attend(), tensors)
        yield from _both_ways(workload, op + suffix, op, attend, inputs, tensors.dout, rep_ms)
    if "choosing" in ops:
        yield from _choosing(workload, tensors, rep_ms)
    if {"selected", "nsa"} & set(ops):
        yield from _overlaps(workload, tensors, ops, suffix)


def peers(
    workload: Workload, device: str, rep_ms: int, choice: Choice, found: list[Peer]
) -> Iterator[Record]:
    """Peers of the workload's ops. Dense ones read no blocks: they run once, with the uniform."""
    suffix = "_real" if choice == "real" else ""
    wanted = [p for p in found if p.op in workload.peers and not (suffix and p.op == "full")]
    if not wanted:
        return
    tensors = make_tensors(workload, device, choice=choice)
    for peer in wanted:
        name = peer.name + suffix
        try:
            attend, inputs, dout = peer.build(tensors, workload.config)
            yield from _both_ways(workload, name, peer.op, attend, inputs, dout, rep_ms)
        except Exception as error:  # whatever a foreign kernel raises at a shape it does not take
            _left_out(f"{workload.name}/{name}", error)


def long_forward(workload: Workload, device: str) -> Iterator[Record]:
    """Forward of the whole op, once it is right on a few rows, and of torch's best dense kernel.

    Raises:
        RedGate: the rows are not right.
    """
    tensors = make_tensors(workload, device, choice="none")

    def whole() -> Tensor:
        inputs = op_tensors("nsa", tensors)
        return op_output(nsa_kernels, "nsa", inputs, tensors.blocks, workload.config)

    dense = TORCH[-1]
    attend, _, _ = dense.build(tensors, workload.config)
    ms: dict[str, float] = {}
    with torch.no_grad():
        error = _check_rows(workload, "nsa", whole(), tensors)
        ms["nsa"] = once_ms(whole)
        try:
            ms["full"] = once_ms(attend)
        except RuntimeError as refusal:
            _left_out(f"{workload.name}/{dense.name}", refusal)
    yield _record(workload, "nsa", "nsa", "forward", ms["nsa"]) | {"spot_error": error}
    if "full" in ms:
        yield _record(workload, dense.name, "full", "forward", ms["full"])


def _both_ways(
    workload: Workload,
    name: str,
    op: str,
    attend: Callable[[], Tensor],
    inputs: list[Tensor],
    dout: Tensor,
    rep_ms: int,
) -> Iterator[Record]:
    """Forward without autograd, then backward alone."""
    with torch.no_grad():
        ms = median_ms(attend, rep_ms)
    yield _record(workload, name, op, "forward", ms)
    for tensor in inputs:
        tensor.requires_grad_(True)
    try:
        out = attend()
        ms = median_ms(lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True), rep_ms)
        yield _record(workload, name, op, "backward", ms)
    finally:
        for tensor in inputs:
            tensor.requires_grad_(False)


def _choosing(workload: Workload, tensors: Tensors, rep_ms: int) -> Iterator[Record]:
    """Choosing blocks alone, and together with the branch whose scores it needs."""
    config, inputs = workload.config, op_tensors("compressed", tensors)

    def compress() -> Tensor:
        return nsa_kernels.compressed_attention(*inputs, config=config)[1]

    def select(lse: Tensor) -> Tensor:
        return nsa_kernels.select_blocks(tensors.q, tensors.k_cmp, lse, config=config)

    lse = compress()
    for op, run in (
        ("select_blocks", lambda: select(lse)),
        ("compress_and_select", lambda: select(compress())),
    ):
        yield _record(workload, op, op, "forward", median_ms(run, rep_ms))


def _overlaps(
    workload: Workload, tensors: Tensors, ops: tuple[str, ...], suffix: str
) -> Iterator[Record]:
    """How many blocks neighbours share: in the given choice, and in the whole op's own."""
    choices = {"selected": tensors.blocks}
    if "nsa" in ops:
        _, lse = nsa_kernels.compressed_attention(
            *op_tensors("compressed", tensors), config=workload.config
        )
        choices["nsa"] = nsa_kernels.select_blocks(
            tensors.q, tensors.k_cmp, lse, config=workload.config
        )
    for op, blocks in choices.items():
        if op in ops:
            found = measure_overlap(blocks, workload.config)
            record = {
                "name": f"overlap/{workload.name}/{op}{suffix}",
                "value": found.kept,
                "unit": "share",
                "union": {str(span): size for span, size in found.union.items()},
                "distance": found.distance,
            }
            if suffix:
                record["parameters"] = asdict(SHARING if op == "selected" else DRIFT)
            yield record


def _record(workload: Workload, name: str, op: str, direction: str, ms: float) -> Record:
    return {
        "name": f"{workload.name}/{name}/{direction}",
        "value": ms,
        "unit": "ms",
        "direction": direction,
        "flops": least_flops(workload, op, direction),
        "bytes": least_bytes(workload, op, direction),
        "tokens": workload.tokens,
        "heads": workload.heads,
        "groups": workload.groups,
        "key_width": workload.key_width,
        "value_width": workload.value_width,
        "dtype": str(workload.dtype).removeprefix("torch."),
    }


def _check_rows(workload: Workload, op: str, out: Tensor, tensors: Tensors) -> float:
    """Relative error of a few rows at the length that is timed, where the gate is too short.

    They lie at the start, in the middle, at the end, and on both sides of a block's edge.

    Raises:
        RedGate: it is more than MAX_ERROR.
    """
    last, size = workload.tokens - 1, workload.config.selection_block_size
    middle = last // 2 // size * size
    rows = sorted({0, 40, middle - 1, middle, middle + 37, last - 69, last - 1, last})
    error = spot_error(op, out, tensors, workload.config, rows)
    print(f"gate {workload.name} {op}, {len(rows)} rows".ljust(40), f"{error:.4f}", flush=True)
    if not error <= MAX_ERROR:
        raise RedGate(f"{workload.name} {op}: relative error {error} > {MAX_ERROR}, rows {rows}")
    return error


def _left_out(name: str, error: BaseException) -> None:
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    print(f"{name}: left out, it refuses: {first_line}", flush=True)
