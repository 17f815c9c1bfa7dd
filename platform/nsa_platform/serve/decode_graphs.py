"""Decode steps of fixed shapes: padded, so that a CUDA graph captured once can be replayed.

Without graphs a decode step is bound by launches from Python, whatever the device could do. A graph
has fixed addresses and shapes: inputs are copied into buffers that stay, and a step of b sequences
runs as one of the next larger captured size. The rows that are too many decode a sequence of one
token whose page is scratch: nobody reads what they write.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from nsa_platform.config.serve import EngineConfig
from nsa_platform.model.inputs import PagedInputs
from nsa_platform.model.transformer import Transformer
from nsa_platform.serve.capacity import model_len_of
from nsa_platform.serve.kv_cache import KvCache
from nsa_platform.serve.pages import ABSENT

WARM_UP_RUNS = 2
"""Forward passes before a capture: what compiles or allocates once has done so."""
PAGES_FACTOR = 4
"""From one captured length of page tables to the next."""
FEWEST_PAGES = 64


def capture_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Numbers of sequences that graphs are captured for, ascending: powers of two, multiples of 16
    from there on, and max_num_seqs."""
    sizes = {size for size in (1, 2, 4, 8) if size < max_num_seqs}
    return tuple(sorted({*sizes, *range(16, max_num_seqs, 16), max_num_seqs}))


def capture_lengths(max_pages: int) -> tuple[int, ...]:
    """Lengths of page tables that graphs are captured for: how a kernel splits its work over the
    device hangs on them, so short contexts have graphs of their own."""
    lengths = []
    length = FEWEST_PAGES
    while length < max_pages:
        lengths.append(length)
        length *= PAGES_FACTOR
    return (*lengths, max_pages)


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Inputs and scores at addresses that stay, for one shape."""

    ids: Tensor
    inputs: PagedInputs
    logits: Tensor
    graph: torch.cuda.CUDAGraph | None


class DecodeGraphs:
    """Runs decode steps in the smallest captured shape that holds them."""

    def __init__(
        self, model: Transformer, cache: KvCache, *, sizes: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Capture a graph for each number of sequences and each length of page tables. On a device
        without graphs the same padded steps run launch by launch."""
        self.model = model
        self.cache = cache
        self._sizes, self._lengths = sorted(sizes), sorted(lengths)
        self._shapes: dict[tuple[int, int], _Buffers] = {}
        # The largest first: the smaller ones then find room in the memory that it took.
        for num_sequences in reversed(self._sizes):
            for num_pages in reversed(self._lengths):
                shape = num_sequences, num_pages
                self._shapes[shape] = self._captured(*shape)

    @classmethod
    def of(
        cls,
        model: Transformer,
        cache: KvCache,
        config: EngineConfig,
        *,
        context_lens: Sequence[int] | None = None,
    ) -> Self:
        """The shapes that an engine's configuration asks for, for contexts of up to so many tokens
        each; None: short ones and longer ones to max_model_len."""
        book = cache.book
        max_pages = min(book.num_pages, -(-model_len_of(model.config, config) // book.page_size))
        lengths = capture_lengths(max_pages)
        if context_lens is not None:
            lengths = [min(max_pages, -(-length // book.page_size)) for length in context_lens]
        lengths = sorted({cache.table_width(length) for length in lengths})
        sizes = config.cudagraph_capture_sizes or capture_sizes(config.max_num_seqs)
        return cls(model, cache, sizes=sizes, lengths=lengths)

    def shape_for(self, num_sequences: int, num_pages: int) -> tuple[int, int] | None:
        """The captured shape for a step of so many sequences and columns of its page table; None if
        there is none."""
        size = bisect_left(self._sizes, num_sequences)
        length = bisect_left(self._lengths, num_pages)
        if size == len(self._sizes) or length == len(self._lengths):
            return None
        return self._sizes[size], self._lengths[length]

    @torch.no_grad()
    def run(self, ids: Tensor, inputs: PagedInputs) -> Tensor | None:
        """Scores [B, vocab] of B sequences with one new token each, int64 ids [B]; None if no shape
        holds them. They stay as they are until the next run."""
        shape = self.shape_for(*inputs.page_table.shape)
        if shape is None:
            return None
        buffers = self._shapes[shape]
        _fill(buffers, ids, inputs)
        if buffers.graph is None:
            buffers.logits.copy_(self._forward(buffers))
        else:
            buffers.graph.replay()
        return buffers.logits[: len(ids)]

    def _forward(self, buffers: _Buffers) -> Tensor:
        return self.model.logits(self.model(buffers.ids, buffers.inputs).hidden)

    @torch.no_grad()
    def _captured(self, num_sequences: int, num_pages: int) -> _Buffers:
        buffers = self._buffers(num_sequences, num_pages)
        if self.cache.device.type != "cuda":
            return buffers
        stream = torch.cuda.Stream(self.cache.device)
        stream.wait_stream(torch.cuda.current_stream(self.cache.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                buffers.logits.copy_(self._forward(buffers))
        torch.cuda.current_stream(self.cache.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next((one.graph.pool() for one in self._shapes.values() if one.graph), None)
        with torch.cuda.graph(graph, pool=pool):
            buffers.logits.copy_(self._forward(buffers))
        return _Buffers(buffers.ids, buffers.inputs, buffers.logits, graph)

    def _buffers(self, num_sequences: int, num_pages: int) -> _Buffers:
        """Padding alone: each sequence has one token, in scratch."""
        device = self.cache.device

        def ints(*shape: int, value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=device)

        has_window = self.cache.book.window_pool is not None
        table = ints(num_sequences, num_pages, value=ABSENT)
        table[:, 0] = 0
        weight = self.model.embedding.weight
        return _Buffers(
            ids=torch.zeros(num_sequences, dtype=torch.int64, device=device),
            inputs=PagedInputs(
                positions=ints(num_sequences),
                cu_seqlens=torch.arange(num_sequences + 1, dtype=torch.int32, device=device),
                context_lens=ints(num_sequences, value=1),
                page_table=table,
                window_page_table=table.clone() if has_window else None,
                shared_lens=ints(num_sequences),
                caches=self.cache.layers,
            ),
            logits=torch.empty(
                num_sequences, self.model.config.vocab_size, dtype=weight.dtype, device=device
            ),
            graph=None,
        )


def _fill(buffers: _Buffers, ids: Tensor, inputs: PagedInputs) -> None:
    """Copy a step into the buffers, and padding into the rows behind it."""
    count, own = len(ids), buffers.inputs
    for buffer, values, padding in (
        (buffers.ids, ids, 0),
        (own.positions, inputs.positions, 0),
        (own.context_lens, inputs.context_lens, 1),
        (own.shared_lens, inputs.shared_lens, 0),
    ):
        buffer[:count].copy_(values, non_blocking=True)
        buffer[count:].fill_(padding)
    _fill_table(own.page_table, inputs.page_table)
    if own.window_page_table is not None and inputs.window_page_table is not None:
        _fill_table(own.window_page_table, inputs.window_page_table)


def _fill_table(buffer: Tensor, table: Tensor) -> None:
    count, width = table.shape
    buffer[:count, :width].copy_(table, non_blocking=True)
    buffer[:count, width:].fill_(ABSENT)
    buffer[count:, 0].fill_(0)
    buffer[count:, 1:].fill_(ABSENT)
