"""Decode latency: one new token per sequence, NSA over pages against dense attention.

Every op is captured once per input set in one CUDA graph, and the graph is replayed: no launch cost
from Python, and the sets together exceed the L2 cache, so that no call finds the last one's data
there. Keys are random, so chosen blocks lie scattered; a trained model's lie closer together.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_kernels import (
    NsaConfig,
    full_paged_attention,
    nsa_paged_attention,
    num_compressed_blocks,
)

BATCHES = (1, 8, 32)
CONTEXTS = (8192, 16384, 32768, 65536, 131072, 262144)
# Five times the L2 cache of an H100; the largest sets are that large alone, but rotate too.
_ROTATING_BYTES = 256 * 2**20
_REPLAYS = 20
_PAPER = NsaConfig()

Step = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """What is decoded; the default heads are those of the peers' table in the documents."""

    batch: int
    context: int
    heads: int = 64
    groups: int = 4
    key_width: int = 128
    value_width: int = 128
    dtype: torch.dtype = torch.bfloat16
    config: NsaConfig = _PAPER

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's key and value in all groups."""
        return self.groups * (self.key_width + self.value_width) * self.dtype.itemsize

    @property
    def full_bytes(self) -> int:
        """Key and value bytes that dense attention reads in one step."""
        return self.batch * self.context * self.row_bytes

    @property
    def nsa_bytes(self) -> int:
        """Key and value bytes that NSA attends to in one step, each counted once."""
        config = self.config
        rows = num_compressed_blocks(self.context, config)
        rows += min(self.context, config.num_selected_blocks * config.selection_block_size)
        rows += min(self.context, config.window_size)
        return self.batch * rows * self.row_bytes


def _draw(shape: DecodeShape, *sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=shape.dtype, device="cuda")


def _shuffled_table(batch: int, num_pages: int) -> Tensor:
    physical = torch.randperm(batch * num_pages, device="cuda", dtype=torch.int32)
    return physical.view(batch, num_pages)


def _caches(shape: DecodeShape, num_pages: int, rows: int) -> tuple[Tensor, Tensor]:
    pages = shape.batch * num_pages
    return (
        _draw(shape, pages, rows, shape.groups, shape.key_width),
        _draw(shape, pages, rows, shape.groups, shape.value_width),
    )


def _lengths(shape: DecodeShape) -> dict[str, Tensor]:
    ones = torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda")
    context = torch.full((shape.batch,), shape.context, dtype=torch.int32, device="cuda")
    return {"cu_seqlens": ones, "context_lens": context}


def nsa_step(shape: DecodeShape) -> Step:
    """One call of nsa_paged_attention on an input set of its own."""
    config, page = shape.config, shape.config.selection_block_size
    num_pages = -(-shape.context // page)
    window_pages = min(num_pages, config.window_size // page + 1)
    table = _shuffled_table(shape.batch, num_pages)
    window_table = torch.full_like(table, -1)
    window_table[:, num_pages - window_pages :] = _shuffled_table(shape.batch, window_pages)
    caches = (
        *_caches(shape, num_pages, page // config.compression_stride),
        *_caches(shape, num_pages, page),
        *_caches(shape, window_pages, page),
    )
    q = _draw(shape, shape.batch, shape.heads, shape.key_width)
    gates = torch.rand(shape.batch, shape.heads, 3, dtype=shape.dtype, device="cuda")
    lengths = _lengths(shape)
    return lambda: nsa_paged_attention(
        q,
        *caches,
        gates,
        page_table=table,
        window_page_table=window_table,
        cu_seqlens=lengths["cu_seqlens"],
        context_lens=lengths["context_lens"],
        config=config,
    )


def full_step(shape: DecodeShape) -> Step:
    """One call of full_paged_attention on an input set of its own."""
    page = shape.config.selection_block_size
    num_pages = -(-shape.context // page)
    table = _shuffled_table(shape.batch, num_pages)
    k, v = _caches(shape, num_pages, page)
    q = _draw(shape, shape.batch, shape.heads, shape.key_width)
    lengths = _lengths(shape)
    return lambda: full_paged_attention(
        q,
        k,
        v,
        page_table=table,
        cu_seqlens=lengths["cu_seqlens"],
        context_lens=lengths["context_lens"],
    )


def sdpa_step(shape: DecodeShape) -> Step:
    """One call of torch's own attention on contiguous caches, as torch chooses its kernel."""
    q = _draw(shape, shape.batch, shape.heads, 1, shape.key_width)
    k = _draw(shape, shape.batch, shape.groups, shape.context, shape.key_width)
    v = _draw(shape, shape.batch, shape.groups, shape.context, shape.value_width)
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


OPS: dict[str, Callable[[DecodeShape], Step]] = {
    "nsa_paged": nsa_step,
    "full_paged": full_step,
    "torch_sdpa": sdpa_step,
}


def replay_us(steps: list[Step]) -> float:
    """Median microseconds of one step over replays of a graph that runs all of them in turn."""
    side = torch.cuda.Stream()
    # The steps' tables and caches are still being filled by the stream that made them.
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in steps:
            step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    graph.replay()
    times_ms = []
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_ms.append(begin.elapsed_time(end))
    return sorted(times_ms)[_REPLAYS // 2] * 1000 / len(steps)


def measure_decode(
    batches: tuple[int, ...] = BATCHES, contexts: tuple[int, ...] = CONTEXTS
) -> Iterator[dict[str, Any]]:
    """Yield one record per op, batch and context: name, value, unit, and what it was measured on.

    Needs a CUDA device. Two input sets of the largest shape take about 40 GB there.
    """
    for batch in batches:
        for context in contexts:
            shape = DecodeShape(batch, context)
            for name, build in OPS.items():
                moved = shape.nsa_bytes if name == "nsa_paged" else shape.full_bytes
                sets = max(2, -(-_ROTATING_BYTES // moved))
                value = replay_us([build(shape) for _ in range(sets)])
                yield {
                    "name": f"decode/{name}/batch={batch}/context={context}",
                    "value": round(value, 2),
                    "unit": "us",
                    "read_bytes": moved,
                    "read_gb_per_s": round(moved / value / 1e3, 1),
                    "batch": batch,
                    "context": context,
                    "heads": shape.heads,
                    "groups": shape.groups,
                    "key_width": shape.key_width,
                    "value_width": shape.value_width,
                    "dtype": str(shape.dtype).removeprefix("torch."),
                }
                torch.cuda.empty_cache()


if __name__ == "__main__":
    for record in measure_decode():
        print(json.dumps(record), flush=True)
