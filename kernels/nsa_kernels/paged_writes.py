"""What new tokens leave in paged caches: rotated keys, values, and the blocks that they complete.

Two ops that belong before nsa_paged_attention in a layer: rotate_and_write puts the keys and values
of new tokens into their pages, fold_and_write folds the blocks whose last token has come (Eq. 7).
Neither is differentiable, neither waits for the device, and both write rows named by the caller:
row r of a cache [P, page, G, W] is row r % page of physical page r // page. Row 0 is scratch.
"""

from collections.abc import Sequence

from torch import Tensor

from nsa_kernels import checks
from nsa_kernels.dispatch import Backend, backend_module, resolve_backend
from nsa_kernels.new_rows import NewBlocks, NewRows, Phi


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
    angles = (q.shape[0], q.shape[2] // 2)
    for name, tensor in (("cos", cos), ("sin", sin)):
        checks.check_shape(name, tensor, "[T, K / 2]", angles)
    groups, value_width = branches[0].values.shape[1:]
    for branch in branches:
        key_shape = (len(q), groups, q.shape[2])
        checks.check_shape("keys", branch.keys, "[T, G, K]", key_shape)
        checks.check_shape("values", branch.values, "[T, G, V]", (len(q), groups, value_width))
        checks.check_shape("rows", branch.rows, "[T]", (len(q),))
    run = backend_module(resolve_backend(q, backend)).rotate_and_write
    return run(q, branches, cos, sin)


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
    size = new.tail_rows.shape[1]
    checks.check_shape("rows", new.rows, "[E]", new.tail_rows.shape[:1])
    for phi, tail, cache in zip(phis, tails, caches, strict=True):
        groups, width = tail.shape[2:]
        checks.check_shape("cache", cache, "[P, page / d, G, W]", (None, None, groups, width))
        if phi.fold is not None:
            checks.check_shape("fold", phi.fold, "[G, l * W, W]", (groups, size * width, width))
    run = backend_module(resolve_backend(tails[0], backend)).fold_and_write
    run(phis, tails, caches, new)
