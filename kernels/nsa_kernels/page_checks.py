"""Argument checks of the ops over pages: caches, tables, rows, contexts."""

from collections.abc import Iterable

import torch
from torch import Tensor

from nsa_kernels.checks import (
    accumulation_dtype,
    check_groups,
    check_int32,
    check_like_query,
    check_shape,
    expect,
    expect_device,
)
from nsa_kernels.shapes import NsaConfig

FP8 = torch.float8_e4m3fn
"""What caches may hold instead of q's dtype: one sign, four exponent and three mantissa bits."""
_FP8_CAPABILITY = (8, 9)


def check_page_size(k_slc: Tensor, config: NsaConfig) -> None:
    """A page holds a whole number of selection blocks."""
    check_shape("k_slc", k_slc, "[P, page, G, K]", (None, None, None, None))
    page, block = k_slc.shape[1], config.selection_block_size
    expect(
        page > 0 and page % block == 0,
        f"k_slc has pages of {page} tokens; allowed are multiples of selection_block_size={block}",
    )


def check_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    names: tuple[str, str],
    rows: int | None,
    pages: int | None = None,
    groups: int | None = None,
    value_width: int | None = None,
    may_be_fp8: bool = False,
) -> None:
    """k [pages, rows, G, K] and v [pages, rows, G, V] are pools that fit q and are not copied."""
    check_shape(names[0], k, "[pages, rows, G, K]", (pages, rows, groups, q.shape[2]))
    check_shape(names[1], v, "[pages, rows, G, V]", (*k.shape[:3], value_width))
    check_groups(names[0], k.shape[2], q)
    for name, pool in zip(names, (k, v), strict=True):
        _check_cached(name, pool, q, may_be_fp8=may_be_fp8)
        expect(pool.is_contiguous(), f"{name} must be contiguous: a cache is never copied")


def _check_cached(name: str, pool: Tensor, q: Tensor, *, may_be_fp8: bool) -> None:
    """A cache has q's dtype, or fp8 where that is allowed, and q's device."""
    if not may_be_fp8 or pool.dtype != FP8:
        check_like_query(name, pool, q)
    expect_device(name, pool, q)


def check_one_dtype(caches: dict[str, Tensor]) -> None:
    """Caches that one kernel reads in the same way, by name, have one dtype."""
    dtypes = {name: cache.dtype for name, cache in caches.items()}
    expect(len(set(dtypes.values())) == 1, f"caches must have one dtype, got {dtypes}")


def check_fp8(backend: str, caches: Iterable[Tensor]) -> None:
    """fp8 caches lie where the backend can read them."""
    for device in {cache.device for cache in caches if cache.dtype == FP8}:
        if backend != "triton" or device.type != "cuda" or torch.version.hip:
            continue
        capability = torch.cuda.get_device_capability(device)
        expect(
            capability >= _FP8_CAPABILITY,
            f"caches of {FP8} need a GPU of compute capability "
            f"{'.'.join(map(str, _FP8_CAPABILITY))} or later, {device} has "
            f"{'.'.join(map(str, capability))}",
        )


def check_pool(
    name: str,
    pool: Tensor,
    sizes: tuple[int | None, ...],
    x: Tensor,
    *,
    may_be_fp8: bool = False,
) -> None:
    """A cache [pages, rows, G, W] like x that is written in place."""
    check_shape(name, pool, "[pages, rows, G, W]", sizes)
    _check_cached(name, pool, x, may_be_fp8=may_be_fp8)
    expect(pool.is_contiguous(), f"{name} must be contiguous: a cache is written in place")


def check_rows(name: str, rows: Tensor, shape: tuple[int, ...], letters: str, pool: Tensor) -> None:
    """Rows of a pool [pages, rows, G, W]: int64 beside it; values are read on the CPU only."""
    check_shape(name, rows, letters, shape)
    expect(rows.dtype == torch.int64, f"{name} must be int64, got {rows.dtype}")
    expect_device(name, rows, pool)
    expect(rows.is_contiguous(), f"{name} must be contiguous")
    if rows.device.type == "cpu" and rows.numel():
        most = pool.shape[0] * pool.shape[1] - 1
        lowest, highest = int(rows.min()), int(rows.max())
        expect(
            lowest >= 0 and highest <= most,
            f"{name} must lie in [0, {most}], the rows of its pool, got {lowest} to {highest}",
        )


def check_angles(cos: Tensor, sin: Tensor, count: int, letter: str, x: Tensor) -> None:
    """Cosines and sines [count, K / 2] for x [.., K], in the dtype of sums."""
    width = x.shape[-1]
    expect(width % 2 == 0, f"keys must have an even width to be rotated, got K={width}")
    for name, angles in (("cos", cos), ("sin", sin)):
        check_shape(name, angles, f"[{letter}, K / 2]", (count, width // 2))
        wanted = accumulation_dtype(x.dtype)
        expect(angles.dtype == wanted, f"{name} must be {wanted}, got {angles.dtype}")
        expect_device(name, angles, x)
        expect(angles.is_contiguous(), f"{name} must be contiguous")


def check_room(block_indices: Tensor | None, q: Tensor, groups: int, config: NsaConfig) -> None:
    """block_indices, if given, is int32 [T, G, n] and can be written in place."""
    if block_indices is None:
        return
    shape = (q.shape[0], groups, config.num_selected_blocks)
    check_shape("block_indices", block_indices, "[T, G, n]", shape)
    check_int32("block_indices", block_indices, q)
    expect(block_indices.is_contiguous(), "block_indices must be contiguous: it is written")


def check_page_tables(
    tables: dict[str, Tensor], context_lens: Tensor, cu_seqlens: Tensor, q: Tensor
) -> None:
    """context_lens int32 [B] and tables int32 [B, M] agree with cu_seqlens on B."""
    sequences = cu_seqlens.shape[0] - 1
    check_shape("context_lens", context_lens, "[B]", (sequences,))
    check_int32("context_lens", context_lens, q)
    for name, table in tables.items():
        check_shape(name, table, "[B, M]", (sequences, None))
        check_int32(name, table, q)


def check_contexts(
    context_lens: Tensor, cu_seqlens: Tensor, page_table: Tensor, num_pages: int, page: int
) -> None:
    """Every context holds its new tokens and every page of it exists (values, on the CPU only)."""
    if context_lens.device.type != "cpu":
        return
    lengths = cu_seqlens.diff().tolist()
    for b, (context, length) in enumerate(zip(context_lens.tolist(), lengths, strict=True)):
        expect(
            context >= length,
            f"context_lens[{b}]={context} must count the {length} new tokens of the sequence",
        )
        if length:
            _check_pages_exist("page_table", page_table, b, 0, context, num_pages, page)


def check_window_pages(
    context_lens: Tensor,
    cu_seqlens: Tensor,
    window_page_table: Tensor,
    num_pages: int,
    page: int,
    config: NsaConfig,
) -> None:
    """Every page that holds a token of a new token's window exists (values, on the CPU only)."""
    if context_lens.device.type != "cpu":
        return
    lengths = cu_seqlens.diff().tolist()
    for b, (context, length) in enumerate(zip(context_lens.tolist(), lengths, strict=True)):
        start = max(0, context - length - config.window_size + 1)
        if length:
            _check_pages_exist(
                "window_page_table", window_page_table, b, start, context, num_pages, page
            )


def _check_pages_exist(
    name: str, table: Tensor, b: int, start: int, stop: int, num_pages: int, page: int
) -> None:
    """Positions [start, stop) of sequence b lie in pages of the pool."""
    first, last = start // page, -(-stop // page)
    entries = table[b, first:last].tolist()
    expect(
        len(entries) == last - first and all(0 <= entry < num_pages for entry in entries),
        f"{name}[{b}, {first}:{last}]={entries} must name {last - first} of the pool's "
        f"{num_pages} pages to hold positions {start} to {stop - 1}",
    )
