"""What new tokens leave in paged caches: rotated keys, values, folded blocks."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from nsa_kernels import NewBlocks, NewRows, Phi, fold_and_write, rotate_and_write
from nsa_kernels.dispatch import Backend
from nsa_kernels.page_checks import FP8
from tests.kernels.cases import assert_close

PAGES, PAGE = 6, 8
Kind = Literal["mean", "linear", "mlp"]


def draw(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def angles(count: int, key_width: int, device: str) -> tuple[Tensor, Tensor]:
    turns = draw(count, key_width // 2, seed=9).to(device)
    return turns.cos().float(), turns.sin().float()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, K] in float64, channel by channel as complex numbers."""
    first, second = x.double().cpu().chunk(2, -1)
    spun = torch.complex(first, second) * torch.complex(cos.double(), sin.double()).cpu()[:, None]
    return torch.cat((spun.real, spun.imag), -1)


def check_rotate(
    heads: int, groups: int, widths: tuple[int, int], branches: int, dtype: torch.dtype, device: str
) -> None:
    """Rows lie apart, as columns of one projection; untouched rows of the caches stay."""
    tokens, (key_width, value_width) = 5, widths
    pair = groups * (key_width + value_width)
    projected = draw(tokens, heads * key_width + branches * pair).to(dtype).to(device)
    q, *rest = projected.split([heads * key_width, *[groups * w for w in widths] * branches], 1)
    q = q.unflatten(1, (heads, key_width))
    cos, sin = angles(tokens, key_width, device)
    order = torch.randperm(PAGES * PAGE - 1, generator=torch.Generator().manual_seed(1)) + 1
    new = [
        NewRows(
            keys=rest[2 * i].unflatten(1, (groups, key_width)),
            values=rest[2 * i + 1].unflatten(1, (groups, value_width)),
            k_cache=torch.full((PAGES, PAGE, groups, key_width), 7.0, dtype=dtype, device=device),
            v_cache=torch.full((PAGES, PAGE, groups, value_width), 7.0, dtype=dtype, device=device),
            rows=order[i * tokens : (i + 1) * tokens].to(device),
            is_rotated=i != 1,
        )
        for i in range(branches)
    ]
    out = rotate_and_write(q, new, cos, sin, backend="triton")
    assert out.is_contiguous()
    assert_close(out, turned(q, cos, sin), "q")
    for branch in new:
        keys = turned(branch.keys, cos, sin) if branch.is_rotated else branch.keys
        for cache, values in ((branch.k_cache, keys), (branch.v_cache, branch.values)):
            flat = cache.flatten(0, 1)
            assert_close(flat[branch.rows], values, "written rows")
            others = torch.ones(len(flat), dtype=torch.bool, device=device)
            others[branch.rows] = False
            assert (flat[others] == 7.0).all()


def fp8_rows(values: Tensor, backend: Backend, device: str) -> tuple[Tensor, Tensor]:
    """Caches of keys and values after a step with these keys and values, [T, 1, 16] each."""
    count = len(values)
    q = torch.zeros(count, 2, 16, dtype=values.dtype, device=device)
    caches = [torch.zeros(4, 4, 1, 16, dtype=FP8, device=device) for _ in range(2)]
    rows = torch.arange(1, count + 1, device=device)
    values = values.to(device)
    new = NewRows(values, values, caches[0], caches[1], rows, is_rotated=False)
    rotate_and_write(q, [new], *angles(count, 16, device), backend=backend)
    return caches[0].flatten(0, 1)[rows].cpu(), caches[1].flatten(0, 1)[rows].cpu()


def test_fp8_rows_are_the_nearest_and_never_infinite() -> None:
    values = torch.cat([draw(6, 1, 16) * 4, torch.full((1, 1, 16), 1e4)]).float()
    for cache in fp8_rows(values, "torch", "cpu"):
        assert torch.equal(cache[:6].float(), values[:6].to(FP8).float())
        assert (cache[6:].float() == 448).all()
    # The interpreter rounds in its own way: it gets numbers that need no rounding.
    kept = values.clamp(-448, 448).to(FP8).float()
    kept[6:] = 1e4
    for cache, wanted in zip(
        fp8_rows(kept, "triton", "cpu"), fp8_rows(kept, "torch", "cpu"), strict=True
    ):
        assert torch.equal(cache.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_fp8_rows(dtype: torch.dtype, fp8_device: str) -> None:
    values = torch.cat([draw(9, 1, 16), draw(5, 1, 16) / 500, draw(1, 1, 16) * 1e4]).to(dtype)
    for cache, wanted in zip(
        fp8_rows(values, "triton", fp8_device), fp8_rows(values, "torch", "cpu"), strict=True
    ):
        assert torch.equal(cache.view(torch.uint8), wanted.view(torch.uint8))
    values[0, 0, 0] = torch.nan
    assert all(cache[0, 0, 0].isnan() for cache in fp8_rows(values, "triton", fp8_device))


def in_float64(phi: Phi) -> Phi:
    parts = (phi.position, phi.fold, phi.correct)
    return Phi(*(None if part is None else part.double().cpu() for part in parts))


def check_fold(
    kind: Kind, groups: int, widths: tuple[int, int], blocks: int, dtype: torch.dtype, device: str
) -> None:
    """Against the torch backend in float64; some blocks are none, rows of others stay."""
    size, strides = 8, 2

    def make(*sizes: int, seed: int) -> Tensor:
        return draw(*sizes, seed=seed).to(dtype).to(device)

    def phi_of(width: int, seed: int) -> Phi:
        if kind == "mean":
            return Phi()
        position = make(groups, size, width, seed=seed)
        fold = make(groups, size * width, width, seed=seed + 1) / (size * width) ** 0.5
        correct = make(groups, width, width, seed=seed + 2) / width**0.5
        return Phi(position, fold, correct if kind == "mlp" else None)

    def cache_of(width: int) -> Tensor:
        return torch.full((blocks, strides, groups, width), 7.0, dtype=dtype, device=device)

    k_phi, v_phi = phi_of(widths[0], 3), phi_of(widths[1], 6)
    k_tail, v_tail = (make(PAGES, PAGE, groups, width, seed=width) for width in widths)
    before = (cache_of(widths[0]), cache_of(widths[1]))
    generator = torch.Generator().manual_seed(2)
    rows = torch.randperm(blocks * strides - 1, generator=generator)[:blocks] + 1
    rows[1::3] = 0
    cos, sin = angles(blocks, widths[0], device)
    new = NewBlocks(
        tail_rows=torch.randint(0, PAGES * PAGE, (blocks, size), generator=generator).to(device),
        rows=rows.to(device), cos=cos, sin=sin,
    )  # fmt: skip
    for is_rotated in (True, False):
        exact = (before[0].double().cpu(), before[1].double().cpu())
        got = (before[0].clone(), before[1].clone())
        fold_and_write(
            (in_float64(k_phi), in_float64(v_phi)),
            (k_tail.double().cpu(), v_tail.double().cpu()),
            exact,
            NewBlocks(
                new.tail_rows.cpu(), rows, cos.double().cpu(), sin.double().cpu(), is_rotated
            ),
            backend="torch",
        )
        told = replace(new, is_rotated=is_rotated)
        fold_and_write((k_phi, v_phi), (k_tail, v_tail), got, told, backend="triton")
        for cache, wanted in zip(got, exact, strict=True):
            flat = cache.flatten(0, 1)
            assert_close(flat[1:], wanted.flatten(0, 1)[1:], f"{kind} rotated={is_rotated}")
            assert (flat[0] == 7.0).all()


@pytest.mark.parametrize("case", [(1, 1, (16, 16), 1), (6, 2, (32, 16), 2), (20, 1, (48, 32), 3)])
def test_rows_interpreted(case: tuple[int, int, tuple[int, int], int]) -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels imported for the GPU do not run in the interpreter")
    check_rotate(*case, torch.float32, "cpu")


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("case", [(1, (16, 16), 3), (2, (48, 32), 17)], ids=str)
def test_blocks_interpreted(kind: Kind, case: tuple[int, tuple[int, int], int]) -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels imported for the GPU do not run in the interpreter")
    check_fold(kind, *case, torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("widths", [(128, 128), (192, 128), (64, 64)], ids=str)
def test_compiled(widths: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    check_rotate(32, 2, widths, 3, dtype, device)
    for kind in ("mean", "linear", "mlp"):
        check_fold(kind, 2, widths, 19, dtype, device)


def small_rows() -> tuple[Tensor, NewRows, Tensor]:
    """q, a branch and angles that fit together."""
    q, cache = torch.zeros(2, 4, 16), torch.zeros(2, 4, 1, 16)
    keys = torch.zeros(2, 1, 16)
    return q, NewRows(keys, keys, cache, cache.clone(), torch.tensor([1, 2])), torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": torch.zeros(1, 1, 16)}, r"keys must have shape \[T, G, K\]"),
        ({"keys": torch.zeros(2, 1, 16).half()}, "keys has dtype torch.float16"),
        ({"values": torch.zeros(2, 16)}, r"values must have shape \[T, G, V\]"),
        ({"values": torch.zeros(2, 3, 16)}, "G=3 key/value heads, which must divide the H=4"),
        ({"k_cache": torch.zeros(2, 4, 2, 16)}, "k_cache must have shape"),
        ({"v_cache": torch.zeros(2, 4, 1, 32)[..., ::2]}, "v_cache must be contiguous"),
        ({"v_cache": torch.zeros(2, 4, 1, 16).double()}, "v_cache has dtype torch.float64"),
        ({"rows": torch.zeros(2)}, "rows must be int64, got torch.float32"),
        ({"rows": torch.tensor([1, 2, 3, 4])[::2]}, "rows must be contiguous"),
        ({"rows": torch.tensor([1, 8])}, r"rows must lie in \[0, 7\].* got 1 to 8"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, str) else "",
)
def test_rows_that_do_not_fit_are_named(changes: dict[str, Tensor], message: str) -> None:
    q, rows, cos = small_rows()
    rotate_and_write(q, [rows], cos, cos, backend="torch")
    with pytest.raises(ValueError, match=message):
        rotate_and_write(q, [replace(rows, **changes)], cos, cos)


def test_angles_and_branches_that_do_not_fit_are_named() -> None:
    q, rows, cos = small_rows()
    with pytest.raises(ValueError, match="one to three, got 0"):
        rotate_and_write(q, [], cos, cos)
    for angles, message in (
        (torch.zeros(2, 7), r"cos must have shape \[T, K / 2\]"),
        (torch.zeros(2, 16)[:, ::2], "cos must be contiguous"),
        (cos.bfloat16(), "cos must be torch.float32, got torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            rotate_and_write(q, [rows], angles, cos)


def test_blocks_that_do_not_fit_are_named() -> None:
    cache, angles = torch.zeros(2, 4, 1, 16), torch.zeros(1, 8)
    tokens, rows = torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    new = NewBlocks(tokens, rows, angles, angles)
    position, fold, correct = torch.zeros(1, 4, 16), torch.zeros(1, 64, 16), torch.zeros(1, 16, 16)
    linear, mlp = Phi(position, fold), Phi(position, fold, correct)
    pair = (cache, cache.clone())
    fold_and_write((mlp, mlp), pair, pair, new, backend="torch")
    for phis, blocks, message in (
        ((Phi(), Phi()), replace(new, rows=tokens[0]), r"rows must have shape \[E\]"),
        ((Phi(), Phi()), replace(new, tail_rows=rows), r"tail_rows must have shape \[E, l\]"),
        ((Phi(), Phi()), replace(new, cos=angles[:0]), r"cos must have shape \[E, K / 2\]"),
        ((Phi(), linear), new, "phi of values: both must be of one kind"),
        ((replace(linear, fold=fold[:, :32]), linear), new, "phi of keys: fold must have shape"),
        ((mlp, replace(mlp, correct=correct.half())), new, "phi of values: correct has dtype"),
        ((replace(mlp, correct=correct.mT), mlp), new, "phi of keys: correct must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            fold_and_write(phis, pair, pair, blocks)
    with pytest.raises(ValueError, match="phi: give nothing"):
        Phi(fold=fold)
    with pytest.raises(ValueError, match="phis must be two, of keys and values, got 1"):
        fold_and_write((linear,), pair, pair, new)  # pyright: ignore
    small = (pair[0].to(torch.float8_e4m3fn), pair[1].to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match=r"k_tail has dtype torch.float8_e4m3fn; allowed are"):
        fold_and_write((linear, linear), small, pair, new)
