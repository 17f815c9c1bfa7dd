"""The tensors behind the pages, and the inputs of a forward pass on top of them."""

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nsa_platform.config.model import (
    MlaAttentionConfig,
    MobaAttentionConfig,
    ModelConfig,
    NsaAttentionConfig,
)
from nsa_platform.model.cache import FullLayerCache, LatentLayerCache, LayerCache, NsaLayerCache
from nsa_platform.model.cost import window_tokens
from nsa_platform.model.inputs import Observed, PagedInputs
from nsa_platform.serve.pages import ABSENT, PageBook, SequencePages
from nsa_platform.serve.transfer import on_device

FULL_ATTENTION_PAGE_SIZE = 64
LEAST_TABLE_WIDTH = 16
CACHED_TAILS = 16
"""With the prefix cache the window pool has one page more for so many pages of the first pool: as
many as the tails of sequences of CACHED_TAILS * (w + page) tokens take, 9,216 by default."""


def page_size_of(config: ModelConfig, blocks_per_page: int = 1) -> int:
    """Tokens of a page: some selection blocks, so that the page table maps blocks to memory."""
    if blocks_per_page < 1:
        raise ValueError(f"blocks_per_page={blocks_per_page} must be positive")
    attention = config.attention
    if isinstance(attention, MobaAttentionConfig):
        raise ValueError(
            "attention.kind=moba has no cache: it is trained and scored here, and does not "
            "generate; nsa, full and mla do"
        )
    if isinstance(attention, NsaAttentionConfig):
        if attention.selection_top_p is not None:
            raise ValueError(
                f"attention.selection_top_p={attention.selection_top_p} is trained and scored "
                "here, and does not generate: caches are read by all num_selected_blocks"
            )
        return attention.selection_block_size * blocks_per_page
    return FULL_ATTENTION_PAGE_SIZE * blocks_per_page


def check_fp8_cache(config: ModelConfig) -> None:
    """Refuse a model whose cache is not rounded to fp8.

    Raises:
        ValueError: it keeps latents.
    """
    if isinstance(config.attention, MlaAttentionConfig):
        raise ValueError(
            "kv_cache_dtype=fp8 takes a model with attention.kind=nsa or full: the latents of mla "
            "are keys and values of all heads, and are not rounded"
        )


class KvCache:
    """Paged caches of all layers, shared by any number of sequences."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_tokens: int,
        max_new_tokens: int,
        max_sequences: int = 1,
        max_step_tokens: int | None = None,
        blocks_per_page: int = 1,
        enable_prefix_caching: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """Reserve memory for max_sequences sequences that hold num_tokens tokens together.

        max_new_tokens bounds the tokens that one sequence gets in one step (a prefill chunk).
        max_step_tokens bounds those of all sequences in one step: then the window pool can be
        smaller, and suffices as long as sequences are trimmed after each step.
        enable_prefix_caching: pages stay known after their sequences; the window pool is larger.
        kv_dtype: of keys and values that attention reads as they are (NSA: of the selected and the
        sliding branch); float8_e4m3fn, or None for dtype.
        """
        self.config = config
        self.device = torch.device(device)
        kv_dtype = dtype if kv_dtype is None else kv_dtype
        _check_device(config, self.device, kv_dtype)
        page_size = page_size_of(config, blocks_per_page)
        # The last page of each sequence may be partly empty; one page more is scratch.
        num_pages = -(-num_tokens // page_size) + max_sequences
        tail_tokens, lookahead, num_window_pages = 0, 0, None
        if isinstance(config.attention, NsaAttentionConfig):
            tail_tokens = window_tokens(config.attention)
            lookahead = (
                config.attention.compression_block_size - config.attention.compression_stride
            )
            # Tail and new tokens of a sequence start and end anywhere in a page; with the cache a
            # page more holds the tail of its last boundary.
            tail_pages = -(-tail_tokens // page_size) + (3 if enable_prefix_caching else 2)
            num_window_pages = 1 + max_sequences * (tail_pages + max_new_tokens // page_size)
            if max_step_tokens is not None:
                num_window_pages = min(
                    num_window_pages, 1 + max_sequences * tail_pages + max_step_tokens // page_size
                )
            if enable_prefix_caching:
                num_window_pages += tail_pages + num_pages // CACHED_TAILS
            num_window_pages = min(num_window_pages, num_pages)
        self.book = PageBook(
            page_size=page_size,
            num_pages=num_pages,
            tail_tokens=tail_tokens,
            num_window_pages=num_window_pages,
            enable_prefix_caching=enable_prefix_caching,
            lookahead=lookahead,
        )
        self.layers: list[LayerCache] = [
            _layer_cache(config, self.book, self.device, dtype, kv_dtype)
            for _ in range(config.layers)
        ]

    @property
    def page_size(self) -> int:
        return self.book.page_size

    def num_bytes(self) -> int:
        """Memory of all layers."""
        return sum(
            tensor.nbytes
            for layer in self.layers
            for tensor in layer.page_tensors() + layer.window_tensors()
        )

    def description(self) -> dict[str, str]:
        """Its sizes, by vLLM's names: a block is a page there."""
        dtype = self.layers[0].page_tensors()[0].dtype
        return {
            "block_size": str(self.page_size),
            "cache_dtype": str(dtype).removeprefix("torch."),
            "enable_prefix_caching": str(self.book.enable_prefix_caching),
            "num_gpu_blocks": str(self.book.num_pages),
        }

    def extend(self, sequences: Sequence[SequencePages], num_new: Sequence[int]) -> PagedInputs:
        """Give each sequence its next tokens' places, and return the inputs of that step.

        num_new: new tokens of each sequence, at least one. The ids handed to the model are the
        sequences' new tokens in the same order.

        Raises:
            OutOfPages: a pool is exhausted; the sequences are as they were.
        """
        self.book.extend_all(sequences, num_new)
        return self.inputs(sequences, num_new)

    def inputs(
        self,
        sequences: Sequence[SequencePages],
        num_new: Sequence[int],
        *,
        observed: Observed | None = None,
    ) -> PagedInputs:
        """Inputs of a step whose new tokens, the last num_new of each sequence, have places.

        observed: gets what the layers do, as PagedInputs says.
        """
        starts = [s.num_tokens - count for s, count in zip(sequences, num_new, strict=True)]
        positions = [
            position
            for start, count in zip(starts, num_new, strict=True)
            for position in range(start, start + count)
        ]
        ends = [0]
        for count in num_new:
            ends.append(ends[-1] + count)
        has_window = self.book.window_pool is not None
        return PagedInputs(
            positions=self._ints(positions),
            cu_seqlens=self._ints(ends),
            context_lens=self._ints([sequence.num_tokens for sequence in sequences]),
            page_table=self._table([sequence.pages for sequence in sequences]),
            window_page_table=(
                self._table([sequence.window_pages for sequence in sequences])
                if has_window
                else None
            ),
            shared_lens=self._ints([s.num_shared * self.page_size for s in sequences]),
            caches=self.layers,
            observed=observed,
        )

    def release(self, sequence: SequencePages) -> None:
        """Give back the pages of a sequence that has ended."""
        self.book.release(sequence)

    def _ints(self, values: list[int]) -> Tensor:
        return on_device(values, torch.int32, self.device)

    def table_width(self, num_pages: int) -> int:
        """Columns of a page table whose longest row has so many pages."""
        return num_pages if self.device.type == "cpu" else compiled_width(num_pages)

    def _table(self, rows: Sequence["array[int]"]) -> Tensor:
        """int32 [B, M], whole rows copied at once: their length is that of the context."""
        width = self.table_width(max(map(len, rows)))
        table = np.full((len(rows), width), ABSENT, dtype=np.int32)
        for entries, row in zip(table, rows, strict=True):
            entries[: len(row)] = np.frombuffer(row, dtype=np.int32)
        return on_device(table, torch.int32, self.device)


def compiled_width(num_pages: int) -> int:
    """Columns of a page table on a GPU. Kernels are compiled for widths, so that they are few."""
    return max(LEAST_TABLE_WIDTH, 1 << (num_pages - 1).bit_length())


def _check_device(config: ModelConfig, device: torch.device, kv_dtype: torch.dtype) -> None:
    """The device can read such a cache."""
    attention = config.attention
    is_latent = isinstance(attention, MlaAttentionConfig)
    if kv_dtype.itemsize == 1:
        check_fp8_cache(config)
    if device.type != "cuda":
        return
    if kv_dtype.itemsize == 1 and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 9):
            raise ValueError(
                "kv_cache_dtype=fp8 takes a GPU of compute capability 8.9 or later, "
                f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
            )
    if is_latent and (attention.cached_width > 256 or attention.cached_width % 16):
        raise ValueError(
            "attention.kind=mla decodes on a GPU with kv_lora_rank + rotary_width of up to 256, a "
            f"multiple of 16, got {attention.kv_lora_rank} + {attention.rotary_width}"
        )


def _layer_cache(
    config: ModelConfig,
    book: PageBook,
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
) -> LayerCache:
    attention, page_size, num_pages = config.attention, book.page_size, book.pool.num_pages
    num_window_pages = 0 if book.window_pool is None else book.window_pool.num_pages
    is_latent = isinstance(attention, MlaAttentionConfig)
    groups = 1 if is_latent else attention.kv_heads
    key_width, value_width = attention.key_width, attention.value_width

    def zeros(pages: int, rows: int, width: int, kept: torch.dtype = dtype) -> Tensor:
        # Zeros, for a kernel multiplies rows that it masks by 0, and 0 * NaN is NaN.
        return torch.zeros(pages, rows, groups, width, device=device, dtype=kept)

    if is_latent:
        return LatentLayerCache(zeros(num_pages, page_size, attention.cached_width))
    k = zeros(num_pages, page_size, key_width, kv_dtype)
    v = zeros(num_pages, page_size, value_width, kv_dtype)
    if not isinstance(attention, NsaAttentionConfig):
        return FullLayerCache(k, v)
    block_rows = page_size // attention.compression_stride
    is_shared = attention.branch_kv == "shared"
    return NsaLayerCache(
        k_slc=k,
        v_slc=v,
        k_cmp=zeros(num_pages, block_rows, key_width),
        v_cmp=zeros(num_pages, block_rows, value_width),
        k_win=k if is_shared else zeros(num_window_pages, page_size, key_width, kv_dtype),
        v_win=v if is_shared else zeros(num_window_pages, page_size, value_width, kv_dtype),
        k_tail=zeros(num_window_pages, page_size, key_width),
        v_tail=zeros(num_window_pages, page_size, value_width),
    )
