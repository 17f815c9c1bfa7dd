"""Paged caches for tests: whole sequences laid out over shuffled pages, NaN where nothing lies."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsa_kernels import (
    NsaConfig,
    compressed_attention,
    compressed_cu_seqlens,
    full_paged_attention,
    nsa_paged_attention,
    select_blocks,
)
from nsa_kernels.dispatch import Backend
from nsa_kernels.page_checks import FP8
from tests.kernels.cases import Inputs, make_inputs, offsets


@dataclass
class PagedBatch:
    """New tokens, their caches, and the whole sequences from which both were cut."""

    whole: Inputs
    """Every sequence up to its context length."""
    rows: Tensor
    """int64 [T], the packed rows of `whole` that are the new tokens."""
    caches: dict[str, Tensor]
    """k_cmp, v_cmp, k_slc, v_slc, k_win, v_win by physical page."""
    page_table: Tensor
    window_page_table: Tensor
    cu_seqlens: Tensor
    context_lens: Tensor

    def attend(self, block_indices: Tensor | None = None, *, backend: Backend = "triton") -> Tensor:
        """nsa_paged_attention over the new tokens."""
        return nsa_paged_attention(
            self.whole.q[self.rows],
            **self.caches,
            gates=self.whole.gates[self.rows],
            page_table=self.page_table,
            window_page_table=self.window_page_table,
            cu_seqlens=self.cu_seqlens,
            context_lens=self.context_lens,
            config=self.whole.config,
            scale=None,
            block_indices=block_indices,
            backend=backend,
        )

    def selected(self, *, backend: Backend = "triton") -> tuple[Tensor, Tensor]:
        """What attend says the new tokens' blocks are, and what select_blocks says of the same
        rows of the whole sequences, both int32 [T, G, n]."""
        whole = self.whole
        groups = self.caches["k_slc"].shape[2]
        shape = (len(self.rows), groups, whole.config.num_selected_blocks)
        told = torch.full(shape, -7, dtype=torch.int32, device=whole.q.device)
        out = self.attend(told, backend=backend)
        assert torch.equal(out, self.attend(backend=backend))
        sizes = {"config": whole.config, "cu_seqlens": whole.cu_seqlens, "backend": backend}
        _, lse = compressed_attention(whole.q, whole.k_cmp, whole.v_cmp, **sizes)
        wanted = select_blocks(whole.q, whole.k_cmp, lse, **sizes)
        return told, wanted[self.rows]

    def attend_full(self) -> Tensor:
        """full_paged_attention in Triton over the new tokens, on the selection caches."""
        return full_paged_attention(
            self.whole.q[self.rows],
            self.caches["k_slc"],
            self.caches["v_slc"],
            page_table=self.page_table,
            cu_seqlens=self.cu_seqlens,
            context_lens=self.context_lens,
            backend="triton",
        )


def lay_out(
    values: Tensor, starts: list[int], table: Tensor, page_rows: int, num_pages: int
) -> Tensor:
    """Rows of packed sequences in pages [num_pages, page_rows, ...]; NaN where the table has none.

    Rows of pages that the table does not name (-1) are left out.
    """
    pages = torch.full((num_pages, page_rows, *values.shape[1:]), torch.nan, dtype=values.dtype)
    for b in range(len(starts) - 1):
        rows = values[starts[b] : starts[b + 1]]
        for page, first in enumerate(range(0, rows.shape[0], page_rows)):
            physical = int(table[b, page])
            if physical >= 0:
                chunk = rows[first : first + page_rows]
                pages[physical, : chunk.shape[0]] = chunk.cpu()
    return pages.to(values.device)


def page_tables(
    contexts: list[int], new_tokens: list[int], page: int, config: NsaConfig, seed: int
) -> tuple[Tensor, Tensor, int]:
    """Shuffled physical pages, the same for the window without its past pages; pages in all."""
    counts = [-(-context // page) for context in contexts]
    num_pages = sum(counts) + 2
    generator = torch.Generator().manual_seed(seed)
    tables = torch.full((2, len(contexts), max(counts) + 1), -1, dtype=torch.int32)
    for table in tables:
        physical = torch.randperm(num_pages, generator=generator).tolist()
        for b, count in enumerate(counts):
            for p in range(count):
                table[b, p] = physical.pop()
    for b, (context, length) in enumerate(zip(contexts, new_tokens, strict=True)):
        first_seen = max(0, context - length - config.window_size + 1)
        tables[1, b, : first_seen // page] = -1
    return tables[0], tables[1], num_pages


def make_paged(
    contexts: list[int],
    new_tokens: list[int],
    *,
    config: NsaConfig,
    page: int | None = None,
    groups: int = 2,
    heads_per_group: int = 2,
    key_width: int = 16,
    value_width: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    is_fp8: bool = False,
) -> PagedBatch:
    """Sequences of these context lengths of which the last new_tokens each are asked about.

    is_fp8: all caches but the compressed ones are, and `whole` has the numbers that they hold.
    """
    page = page or config.selection_block_size
    whole = make_inputs(
        contexts,
        config=config,
        groups=groups,
        heads_per_group=heads_per_group,
        key_width=key_width,
        value_width=value_width,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    kept = ("k_slc", "v_slc", "k_win", "v_win")
    if is_fp8:
        whole = replace(whole, **{n: getattr(whole, n).to(FP8).to(dtype) for n in kept})
    table, window_table, num_pages = page_tables(contexts, new_tokens, page, config, seed)
    starts = whole.cu_seqlens.tolist()
    starts_cmp = compressed_cu_seqlens(whole.cu_seqlens.cpu(), config).tolist()
    strides = page // config.compression_stride
    rows = [
        torch.arange(stop - length, stop)
        for stop, length in zip(starts[1:], new_tokens, strict=True)
    ]
    caches = {
        "k_cmp": lay_out(whole.k_cmp, starts_cmp, table, strides, num_pages),
        "v_cmp": lay_out(whole.v_cmp, starts_cmp, table, strides, num_pages),
        "k_slc": lay_out(whole.k_slc, starts, table, page, num_pages),
        "v_slc": lay_out(whole.v_slc, starts, table, page, num_pages),
        "k_win": lay_out(whole.k_win, starts, window_table, page, num_pages),
        "v_win": lay_out(whole.v_win, starts, window_table, page, num_pages),
    }
    if is_fp8:
        caches |= {name: caches[name].to(FP8) for name in kept}
    return PagedBatch(
        whole=whole,
        rows=torch.cat(rows).to(device),
        caches=caches,
        page_table=table.to(device),
        window_page_table=window_table.to(device),
        cu_seqlens=offsets(new_tokens, device),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
    )
