"""nsa_paged_attention and full_paged_attention: new tokens against caches that lie in pages.

A page holds `page` tokens, a multiple of the selection block. Page p of a sequence covers its
positions [p*page, (p+1)*page). One physical page number, page_table[b, p], finds the selection keys
and values and the compressed ones (block i lies in page (i*d) // page, row (i*d % page) // d);
window keys and values have a pool and a table of their own, whose old entries may be given up.

Caches have q's dtype; all but the compressed ones may be torch.float8_e4m3fn together. They hold
numbers up to 448 without a scale: keys and values behind a norm have a few units at most.
"""

import torch
from torch import Tensor

from nsa_kernels import checks, page_checks
from nsa_kernels.dispatch import Backend, backend_module, resolve_backend
from nsa_kernels.shapes import NsaConfig


@torch.library.custom_op("nsa_kernels::nsa_paged_attention", mutates_args=("block_indices",))
def _attend(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    page_table: Tensor,
    window_page_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    block_indices: Tensor | None,
    sizes: list[int],
    scale: float,
    backend: str,
) -> Tensor:
    config = NsaConfig(*sizes)
    page = k_slc.shape[1]
    checks.check_offsets(cu_seqlens, q.shape[0])
    checks.check_gate_values(gates)
    page_checks.check_contexts(context_lens, cu_seqlens, page_table, k_slc.shape[0], page)
    page_checks.check_window_pages(
        context_lens, cu_seqlens, window_page_table, k_win.shape[0], page, config
    )
    return backend_module(backend).paged_attention(
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates,
        page_table, window_page_table, cu_seqlens, context_lens, config, scale,
        block_indices=block_indices,
    )  # fmt: skip


@_attend.register_fake
def _(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    page_table: Tensor,
    window_page_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    block_indices: Tensor | None,
    sizes: list[int],
    scale: float,
    backend: str,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v_slc.shape[3])


@torch.library.custom_op("nsa_kernels::full_paged_attention", mutates_args=())
def _attend_full(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    scale: float,
    backend: str,
) -> Tensor:
    checks.check_offsets(cu_seqlens, q.shape[0])
    page_checks.check_contexts(context_lens, cu_seqlens, page_table, k.shape[0], k.shape[1])
    run = backend_module(backend).full_paged_attention
    return run(q, k, v, page_table, cu_seqlens, context_lens, scale)


@_attend_full.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    scale: float,
    backend: str,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[3])


def _check(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    config: NsaConfig,
    backend: Backend | None,
) -> Backend:
    """Refuse new tokens and caches that do not fit together; the backend that takes them."""
    checks.check_query(q)
    checks.check_config(config)
    page_checks.check_page_size(k_slc, config)
    pages, page, groups, _ = k_slc.shape
    strides = page // config.compression_stride
    for names, pair, rows, count, may_be_fp8 in (
        (("k_slc", "v_slc"), (k_slc, v_slc), page, None, True),
        (("k_cmp", "v_cmp"), (k_cmp, v_cmp), strides, pages, False),
        (("k_win", "v_win"), (k_win, v_win), page, None, True),
    ):
        page_checks.check_pages(
            q, *pair, names=names, rows=rows, pages=count, groups=groups, may_be_fp8=may_be_fp8,
            value_width=None if pair[1] is v_slc else v_slc.shape[3],
        )  # fmt: skip
    page_checks.check_one_dtype({"k_slc": k_slc, "v_slc": v_slc, "k_win": k_win, "v_win": v_win})
    checks.check_gates(gates, q)
    chosen = resolve_backend(q, backend)
    checks.check_limits(chosen, q, v_slc.shape[3], k_slc.shape[2])
    page_checks.check_fp8(chosen, (k_slc, v_slc, k_win, v_win))
    return chosen


def nsa_paged_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    *,
    page_table: Tensor,
    window_page_table: Tensor,
    cu_seqlens: Tensor | None = None,
    context_lens: Tensor,
    config: NsaConfig,
    scale: float | None = None,
    block_indices: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Rows of nsa_attention for new tokens whose past, and who themselves, lie in paged caches.

    The caller has written the new tokens' keys and values and every compressed block complete
    within context_lens. New token r of the q_len of sequence b has position
    context_lens[b] - q_len + r: one token is decoding, many are a chunk of a prompt.

    Args:
        q: [T, H, K], the new tokens, sequences packed one after the other.
        k_cmp, v_cmp: [P, page/d, G, K] and [P, page/d, G, V], by physical page.
        k_slc, v_slc: [P, page, G, K] and [P, page, G, V].
        k_win, v_win: [W, page, G, K] and [W, page, G, V], a pool of their own.
        gates: [T, H, 3], in the order cmp, slc, win.
        page_table: int32 [B, M], physical page of each logical page, -1 for none.
        window_page_table: int32 [B, M], likewise in the window pool; pages without one of the last
            w + q_len tokens are never read and may be -1.
        cu_seqlens: int32 [B+1], where each sequence's new tokens start; None for one sequence.
        context_lens: int32 [B], tokens in each sequence's cache, the new ones included.
        scale: factor on q.k, 1/sqrt(K) unless given.
        block_indices: int32 [T, G, n], gets what select_blocks would return for the new tokens.
        backend: "triton" or "torch"; None leaves it to the device (see dispatch.py).

    Returns:
        out [T, H, V] in q's dtype. Not differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the backend cannot run. The
            values of index tensors are checked on the CPU only: elsewhere it would cost a sync.
    """
    chosen = _check(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, config, backend)
    offsets = checks.packed_offsets(cu_seqlens, q)
    tables = {"page_table": page_table, "window_page_table": window_page_table}
    page_checks.check_page_tables(tables, context_lens, offsets, q)
    page_checks.check_room(block_indices, q, k_slc.shape[2], config)
    return _attend(
        q.contiguous(), k_cmp.contiguous(), v_cmp.contiguous(), k_slc.contiguous(),
        v_slc.contiguous(), k_win.contiguous(), v_win.contiguous(), gates.contiguous(),
        page_table.contiguous(), window_page_table.contiguous(), offsets, context_lens.contiguous(),
        block_indices, config.sizes, checks.resolve_scale(scale, q), chosen,
    )  # fmt: skip


def full_paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    page_table: Tensor,
    cu_seqlens: Tensor | None = None,
    context_lens: Tensor,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Rows of full_attention for new tokens whose past, and who themselves, lie in paged caches.

    Args:
        q: [T, H, K], the new tokens, sequences packed one after the other.
        k: [P, page, G, K], keys by physical page.
        v: [P, page, G, V].
        page_table: int32 [B, M], physical page of each logical page, -1 for none.
        cu_seqlens: int32 [B+1], where each sequence's new tokens start; None for one sequence.
        context_lens: int32 [B], tokens in each sequence's cache, the new ones included.
        scale: factor on q.k, 1/sqrt(K) unless given.
        backend: "triton" or "torch"; None leaves it to the device (see dispatch.py).

    Returns:
        out [T, H, V] in q's dtype. Not differentiable.

    Raises:
        ValueError: as nsa_paged_attention.
    """
    checks.check_query(q)
    page_checks.check_pages(q, k, v, names=("k", "v"), rows=None, may_be_fp8=True)
    page_checks.check_one_dtype({"k": k, "v": v})
    checks.expect(k.shape[1] > 0, "k and v must have pages of at least one token, got 0")
    offsets = checks.packed_offsets(cu_seqlens, q)
    page_checks.check_page_tables({"page_table": page_table}, context_lens, offsets, q)
    chosen = resolve_backend(q, backend)
    checks.check_limits(chosen, q, v.shape[3], k.shape[2])
    page_checks.check_fp8(chosen, (k, v))
    return _attend_full(
        q.contiguous(), k.contiguous(), v.contiguous(), page_table.contiguous(), offsets,
        context_lens.contiguous(), checks.resolve_scale(scale, q), chosen,
    )  # fmt: skip
