"""What new tokens leave in paged caches: rotated keys, values, and the blocks that they complete.

Two ops that belong before nsa_paged_attention in a layer: rotate_and_write puts the keys and values
of new tokens into their pages, fold_and_write folds the blocks whose last token has come (Eq. 7).
Neither is differentiable, neither waits for the device, and both write rows named by the caller:
row r of a cache [P, page, G, W] is row r % page of physical page r // page. Row 0 is scratch.
A cache that is not folded from may be fp8 (torch.float8_e4m3fn): what is beyond 448 becomes 448.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_kernels import checks, page_checks
from nsa_kernels.dispatch import Backend, backend_module, resolve_backend
from nsa_kernels.new_rows import NewBlocks, NewRows, Phi


@torch.no_grad()
def rotate_and_write(
    q: Tensor,
    branches: Sequence[NewRows],
    cos: Tensor,
    sin: Tensor,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Rotate new queries and keys (channel c with c + K / 2) and write keys and values.

    Args:
        q: [T, H, K], not rotated.
        branches: one to three, with keys and values of equal widths.
        cos: fp32 (fp64 for fp64) [T, K / 2], of the tokens' positions.
        sin: likewise.
        backend: "triton" or "torch"; None leaves it to the device (see dispatch.py).

    Returns:
        The rotated q, [T, H, K], contiguous.

    Raises:
        ValueError: shapes do not fit together, or the backend cannot run.
    """
    checks.check_query(q)
    if not 1 <= len(branches) <= 3:
        raise ValueError(f"branches must be one to three, got {len(branches)}")
    page_checks.check_angles(cos, sin, len(q), "T", q)
    groups, value_width = _groups_and_width(branches[0])
    checks.check_groups("values", groups, q)
    for branch in branches:
        keys, values = (len(q), groups, q.shape[2]), (len(q), groups, value_width)
        checks.check_shape("keys", branch.keys, "[T, G, K]", keys)
        checks.check_shape("values", branch.values, "[T, G, V]", values)
        checks.check_like_query("keys", branch.keys, q)
        checks.check_like_query("values", branch.values, q)
        pool = (None, None, groups, q.shape[2])
        page_checks.check_pool("k_cache", branch.k_cache, pool, q, may_be_fp8=True)
        pool = (*branch.k_cache.shape[:2], groups, value_width)
        page_checks.check_pool("v_cache", branch.v_cache, pool, q, may_be_fp8=True)
        page_checks.check_one_dtype({"k_cache": branch.k_cache, "v_cache": branch.v_cache})
        page_checks.check_rows("rows", branch.rows, (len(q),), "[T]", branch.k_cache)
    chosen = resolve_backend(q, backend)
    checks.check_limits(chosen, q, value_width, groups)
    page_checks.check_fp8(chosen, (c for one in branches for c in (one.k_cache, one.v_cache)))
    run = backend_module(chosen).rotate_and_write
    return run(q, branches, cos, sin)


@torch.no_grad()
def fold_and_write(
    phis: tuple[Phi, Phi],
    tails: tuple[Tensor, Tensor],
    caches: tuple[Tensor, Tensor],
    new: NewBlocks,
    *,
    backend: Backend | None = None,
) -> None:
    """Fold the blocks that are new and write them: keys, rotated to their blocks' starts, values.

    Args:
        phis: of keys and of values, of one kind.
        tails: [W, page, G, K] and [W, page, G, V], what is folded, by physical page.
        caches: [P, page / d, G, K] and [P, page / d, G, V], the compressed keys and values.
        backend: "triton" or "torch"; None leaves it to the device (see dispatch.py).

    Raises:
        ValueError: shapes do not fit together, or the backend cannot run.
    """
    for name, pair in (("phis", phis), ("tails", tails), ("caches", caches)):
        checks.expect(len(pair) == 2, f"{name} must be two, of keys and values, got {len(pair)}")
    (k_tail, v_tail), (k_cmp, v_cmp) = tails, caches
    for name, tail in (("k_tail", k_tail), ("v_tail", v_tail)):
        page_checks.check_pool(name, tail, (*k_tail.shape[:2], k_tail.shape[2], None), k_tail)
        checks.check_dtype(name, tail)
    groups, widths = k_tail.shape[2], (k_tail.shape[3], v_tail.shape[3])
    page_checks.check_pool("k_cmp", k_cmp, (None, None, groups, widths[0]), k_tail)
    page_checks.check_pool("v_cmp", v_cmp, (*k_cmp.shape[:2], groups, widths[1]), k_tail)
    checks.check_shape("tail_rows", new.tail_rows, "[E, l]", (None, None))
    count, size = new.tail_rows.shape
    page_checks.check_rows("tail_rows", new.tail_rows, (count, size), "[E, l]", k_tail)
    page_checks.check_rows("rows", new.rows, (count,), "[E]", k_cmp)
    page_checks.check_angles(new.cos, new.sin, count, "E", k_tail)
    for name, phi, width in zip(("keys", "values"), phis, widths, strict=True):
        _check_phi(f"phi of {name}", phi, phis[0], (groups, size, width), k_tail)
    chosen = resolve_backend(k_tail, backend)
    checks.check_limits(chosen, k_tail[0], widths[1], groups)
    backend_module(chosen).fold_and_write(phis, tails, caches, new)


def _groups_and_width(branch: NewRows) -> tuple[int, int]:
    checks.check_shape("values", branch.values, "[T, G, V]", (None, None, None))
    return branch.values.shape[1], branch.values.shape[2]


def _check_phi(name: str, phi: Phi, first: Phi, sizes: tuple[int, int, int], like: Tensor) -> None:
    """phi has what its kind needs, in the dtype of what it folds, and is of the first's kind."""
    groups, size, width = sizes
    if (phi.fold is None, phi.correct is None) != (first.fold is None, first.correct is None):
        raise ValueError(f"{name}: both must be of one kind (mean, linear or mlp)")
    for part, tensor, letters, shape in (
        ("position", phi.position, "[G, l, W]", (groups, size, width)),
        ("fold", phi.fold, "[G, l * W, W]", (groups, size * width, width)),
        ("correct", phi.correct, "[G, W, W]", (groups, width, width)),
    ):
        if tensor is not None:
            checks.check_shape(f"{name}: {part}", tensor, letters, shape)
            checks.check_like_query(f"{name}: {part}", tensor, like)
            if not tensor.is_contiguous():
                raise ValueError(f"{name}: {part} must be contiguous")
