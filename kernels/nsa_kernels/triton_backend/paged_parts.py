"""What the paged kernels share: rows of one new token, scores, a running softmax, its parts.

Keys and values of a cache may be fp8: they are widened to the query's dtype where they are read.
A program reads one part of the keys that its queries see and leaves a normalised partial output
with its lse; paged_merge joins the parts.
"""

import triton
import triton.language as tl

from nsa_kernels.triton_backend.tiles import LN_2, load_rows, store_rows


@triton.jit
def load_split(
    matrix,
    o_row,
    m_row,
    K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_TAIL: tl.constexpr,
):
    """Main and tail columns of the rows of m_row; the main ones twice where there is no tail."""
    b_main = load_rows(matrix, o_row, m_row, 0, K_MAIN, K, True)
    b_tail = b_main
    if K_TAIL > 0:
        b_tail = load_rows(matrix, o_row, m_row, K_MAIN, K_TAIL, K, True)
    return b_main, b_tail


@triton.jit
def score_split(b_q, b_q_tail, b_k, b_k_tail, K_TAIL: tl.constexpr):
    """Unscaled products of query rows with key rows, fp32."""
    score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if K_TAIL > 0:
        score = tl.dot(b_q_tail, tl.trans(b_k_tail), score, input_precision="ieee")
    return score


@triton.jit
def soften(score, largest):
    """One step of a running softmax in base 2: (grown maximum, p, decay).

    The maximum is rounded up to a whole number, so that weights taken against different maxima
    differ by powers of two alone and equal scores stay equal, bit for bit, wherever they were seen.
    """
    grown = tl.maximum(largest, tl.ceil(tl.max(score, 1)))
    # A tile may hold no key at all; -inf minus -inf would be NaN.
    shift = tl.where(grown == -float("inf"), 0.0, grown)
    return grown, tl.exp2(score - shift[:, None]), tl.exp2(largest - shift)


@triton.jit
def attend_keys(
    b_q,
    b_q_tail,
    k,
    v,
    o_row,
    m_row,
    seen,
    largest,
    total,
    acc,
    scale_log2,
    K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_TAIL: tl.constexpr,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
):
    """Fold the cache rows o_row (int64, counted in keys) into a running softmax in base 2.

    m_row says which of them may be read, seen [queries or 1, keys] which query sees which. Returns
    (maximum, total, acc, p against that maximum).
    """
    b_k, b_k_tail = load_split(k, o_row * K, m_row, K, K_MAIN, K_TAIL)
    b_v = load_rows(v, o_row * V, m_row, 0, V_PADDED, V, True)
    b_k, b_k_tail, b_v = b_k.to(b_q.dtype), b_k_tail.to(b_q.dtype), b_v.to(b_q.dtype)
    score = score_split(b_q, b_q_tail, b_k, b_k_tail, K_TAIL) * scale_log2
    score = tl.where(seen, score, -float("inf"))
    grown, b_p, decay = soften(score, largest)
    acc = tl.dot(b_p.to(b_v.dtype), b_v, acc * decay[:, None], input_precision="ieee")
    return grown, total * decay + tl.sum(b_p, 1), acc, b_p


@triton.jit
def store_partial(
    partial_out,
    partial_lse,
    o_head,
    m_head,
    i_split,
    largest,
    total,
    acc,
    ALL_SPLITS,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
):
    """Write one part: partial_out [rows, H, ALL_SPLITS, V] normalised, partial_lse natural.

    A part without keys leaves its lse alone, -inf.
    """
    o_part = o_head * ALL_SPLITS + i_split
    is_empty = total == 0.0
    out = acc / tl.where(is_empty, 1.0, total)[:, None]
    lse = (largest + tl.log2(tl.where(is_empty, 1.0, total))) * LN_2
    tl.store(partial_lse + o_part, tl.where(is_empty, -float("inf"), lse), m_head)
    store_rows(partial_out, out, o_part * V, m_head & (total > 0.0), 0, V_PADDED, V)
