"""Times tile sizes of each attention kernel on this GPU: where the tables in the kernels come from.

    python kernels/benchmarks/tune.py [--workload 32k] [--kernel span_dkv:compressed]

Prints the best candidates of each kernel, and the table's own entry. Nothing is changed: a better
entry goes into the kernel's table by hand, with its reason.
"""

import argparse
import importlib
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from triton.runtime.errors import OutOfResources

from benchmarks.timing import median_ms
from benchmarks.workloads import WORKLOADS, Tensors, Workload, make_tensors
from nsa_kernels.triton_backend.selected_backward import selected_gradients
from nsa_kernels.triton_backend.selected_by_block import forward_by_block
from nsa_kernels.triton_backend.selected_forward import forward_by_tile
from nsa_kernels.triton_backend.span_dkv import span_dkv
from nsa_kernels.triton_backend.span_dq import span_dq
from nsa_kernels.triton_backend.span_forward import (
    compressed_span,
    full_span,
    sliding_span,
    span_forward,
)
from nsa_kernels.triton_backend.tiles import Tiles, row_delta

BEST = 6
STAGES = (2, 3, 4)


@dataclass(frozen=True, slots=True)
class Tunable:
    """A kernel: what runs it, where its table is looked up, and which sizes to try."""

    module: str
    table: str
    run: Callable[[], Any]
    rows: tuple[int, ...]
    keys: tuple[int, ...]
    warps: tuple[int, ...]

    def time(self, tiles: Tiles | None) -> float:
        """Median milliseconds with these tiles (None: the table's); infinite if they do not fit."""
        module = importlib.import_module(f"nsa_kernels.triton_backend.{self.module}")
        table = getattr(module, self.table) if tiles is None else lambda *_: tiles
        with mock.patch.object(module, self.table, table):
            try:
                return median_ms(self.run, rep_ms=50)
            except OutOfResources:
                return float("inf")
            except RuntimeError as error:
                print(f"  {tiles}: {str(error).splitlines()[0]}", flush=True)
                return float("inf")


def tunables(workload: Workload, tensors: Tensors) -> dict[str, Tunable]:
    """Every kernel with a table, by name and, for spans, by which keys a query sees."""
    config, q, dout = workload.config, tensors.q, tensors.dout
    cu_seqlens = torch.tensor([0, workload.tokens], dtype=torch.int32, device=q.device)
    scale = workload.key_width**-0.5
    spans = {
        "compressed": (compressed_span(cu_seqlens, config), tensors.k_cmp, tensors.v_cmp),
        "sliding": (sliding_span(cu_seqlens, config), tensors.k_win, tensors.v_win),
        "full": (full_span(cu_seqlens), tensors.k_win, tensors.v_win),
    }
    rows, keys, warps = (64, 128), (32, 64, 128), (4, 8)
    found = {}
    for name, (span, k, v) in spans.items():
        forward = partial(span_forward, q, k, v, cu_seqlens, span, scale)
        out, lse = forward()
        delta = row_delta(out, dout, lse, torch.zeros_like(lse))
        saved = (dout, q, k, v, lse, delta, cu_seqlens, span, scale)
        dq, dkv = partial(span_dq, *saved), partial(span_dkv, *saved)
        found[f"span_forward:{name}"] = Tunable(
            "span_forward", "span_forward_tiles", forward, rows, keys, warps
        )
        found[f"span_dq:{name}"] = Tunable("span_dq", "dq_tiles", dq, rows, keys, warps)
        found[f"span_dkv:{name}"] = Tunable(
            "span_dkv", "dkv_tiles", dkv, (16, 32, 64, 128), (64, 128), warps
        )
    return found | selected_tunables(workload, tensors, cu_seqlens)


def selected_tunables(
    workload: Workload, tensors: Tensors, cu_seqlens: torch.Tensor
) -> dict[str, Tunable]:
    """The kernels of selected attention, both forward passes whatever the size of a group."""
    config, q, k, v = workload.config, tensors.q, tensors.k_slc, tensors.v_slc
    blocks, block = tensors.blocks, config.selection_block_size
    heads_per_group = q.shape[1] // k.shape[1]
    chosen = (blocks, cu_seqlens, config, workload.key_width**-0.5)
    by_tile = partial(forward_by_tile, q, k, v, *chosen)
    by_block = partial(forward_by_block, q, k, v, *chosen)
    out, lse = by_tile()
    delta = row_delta(out, tensors.dout, lse, torch.zeros_like(lse))
    backward = partial(selected_gradients, tensors.dout, q, k, v, lse, delta, *chosen)
    keys, warps = tuple(n for n in (32, 64) if n <= block), (4, 8)
    rows = tuple(n for n in (32, 64, 128) if n >= heads_per_group)
    return {
        "selected_by_tile": Tunable(
            "selected_forward", "by_tile_tiles", by_tile, rows, keys, warps
        ),
        "selected_by_block": Tunable(
            "selected_by_block", "by_block_tiles", by_block, rows, keys, warps
        ),
        "selected_backward": Tunable(
            "selected_backward", "backward_tiles", backward, rows, keys, warps
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", default="32k", choices=[w.name for w in WORKLOADS])
    parser.add_argument("--kernel", help="only kernels whose name starts so")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune: needs a CUDA or ROCm GPU; torch sees none", file=sys.stderr)
        return 2
    workload = next(w for w in WORKLOADS if w.name == arguments.workload)
    for name, tunable in tunables(workload, make_tensors(workload, "cuda")).items():
        if arguments.kernel and not name.startswith(arguments.kernel):
            continue
        print(f"{name}: the table's entry {tunable.time(None):.3f} ms", flush=True)
        sizes = itertools.product(tunable.rows, tunable.keys, tunable.warps, STAGES)
        times = [(tunable.time(tiles), tiles) for tiles in itertools.starmap(Tiles, sizes)]
        for ms, tiles in sorted(times, key=lambda pair: pair[0])[:BEST]:
            print(f"  {ms:8.3f} ms  {tiles}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
