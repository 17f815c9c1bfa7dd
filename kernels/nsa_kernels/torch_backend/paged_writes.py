"""What new tokens leave in paged caches, by torch's indexing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_kernels.new_rows import NewBlocks, NewRows, Phi, fold_blocks
from nsa_kernels.page_checks import FP8


def rotate_and_write(q: Tensor, branches: Sequence[NewRows], cos: Tensor, sin: Tensor) -> Tensor:
    """The rotated q; keys and values are written."""
    for branch in branches:
        keys = _turn(branch.keys, cos, sin) if branch.is_rotated else branch.keys
        _write(branch.k_cache, branch.rows, keys)
        _write(branch.v_cache, branch.rows, branch.values)
    return _turn(q, cos, sin)


def fold_and_write(
    phis: tuple[Phi, Phi], tails: tuple[Tensor, Tensor], caches: tuple[Tensor, Tensor],
    new: NewBlocks,
) -> None:  # fmt: skip
    """Compressed keys and values are written."""
    for phi, tail, cache, is_key in zip(phis, tails, caches, (True, False), strict=True):
        blocks = tail.view(-1, *tail.shape[2:])[new.tail_rows]  # [E, l, G, W]
        folded = fold_blocks(blocks.permute(2, 0, 1, 3), phi).to(tail.dtype)
        if is_key and new.is_rotated:
            folded = _turn(folded, new.cos, new.sin)
        _write(cache, new.rows, folded)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, K] rotated by the angles of each row, in x's dtype."""
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def _write(cache: Tensor, rows: Tensor, values: Tensor) -> None:
    if cache.dtype == FP8:
        most = torch.finfo(FP8).max
        values = values.clamp(-most, most)
    cache.view(-1, *cache.shape[2:])[rows] = values.to(cache.dtype)
