"""Linear layers on few rows with norm, activation and residual, against float64."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_kernels import Projection, RmsNorm, new_tallies, project
from nsa_kernels.few_rows import MOST_ROWS
from nsa_kernels.projections import Activation
from nsa_kernels.triton_backend.few_rows import plan
from tests.kernels.cases import assert_close


@dataclass(frozen=True)
class Case:
    rows: int
    width: int
    layers: tuple[tuple[int, Activation], ...]
    """Outputs of each layer, and what follows it."""
    has_bias: bool = False
    is_normed: bool = True
    is_added: bool = False


CASES = (
    Case(1, 64, ((96, "none"),)),
    Case(5, 320, ((80, "none"), (33, "none"), (12, "sigmoid")), has_bias=True),
    Case(16, 256, ((64, "none"), (48, "sigmoid"))),
    Case(17, 100, ((50, "none"),), is_normed=False, is_added=True),
    Case(3, 544, ((70, "swiglu"),)),
    Case(40, 96, ((32, "swiglu"),), has_bias=True, is_added=True),
    Case(64, 80, ((40, "none"),), is_normed=False),
    Case(MOST_ROWS + 1, 48, ((24, "none"),), is_added=True),
)


def draw(*sizes: int, seed: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected(x: Tensor, one: Projection, norm: RmsNorm | None, residual: Tensor | None) -> Tensor:
    """The definition, in float64."""
    x = x.double().cpu()
    if norm is not None:
        root = (x.square().mean(1, keepdim=True) + norm.eps).sqrt()
        x = x / root * norm.weight.double().cpu()
    out = x @ one.weight.double().cpu().T
    if one.bias is not None:
        out = out + one.bias.double().cpu()
    if one.activation == "sigmoid":
        out = 1 / (1 + (-out).exp())
    if one.activation == "swiglu":
        gate, up = out.tensor_split(2, dim=1)
        out = gate / (1 + (-gate).exp()) * up
    return out if residual is None else out + residual.double().cpu()


def check(case: Case, dtype: torch.dtype, device: str, backend: str) -> None:
    x = draw(case.rows, case.width, seed=1).to(device, dtype)
    layers = []
    for seed, (outputs, activation) in enumerate(case.layers):
        rows = outputs * (2 if activation == "swiglu" else 1)
        weight = draw(rows, case.width, seed=10 + seed) / case.width**0.5
        bias = draw(rows, seed=20 + seed).to(device, dtype) if case.has_bias else None
        layers.append(Projection(weight.to(device, dtype), bias, activation))
    norm = None
    if case.is_normed:
        norm = RmsNorm(1 + 0.3 * draw(case.width, seed=2).to(device, dtype), eps=1e-2)
    residual = None
    if case.is_added:
        residual = draw(case.rows, case.layers[0][0], seed=3).to(device, dtype)
    tallies = new_tallies(device)
    rest: Any = {"norm": norm, "residual": residual, "backend": backend}
    for shared in (None, tallies, tallies):
        outs = project(x, layers, tallies=shared, **rest)
        assert len(outs) == len(layers)
        for out, one in zip(outs, layers, strict=True):
            assert out.dtype == dtype
            assert_close(out, expected(x, one, norm, residual), "out")
    assert not tallies.any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_against_float64(case: Case) -> None:
    check(case, torch.float32, "cpu", "triton")


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_kernel_in_half_precision(case: Case) -> None:
    check(case, torch.float16, "cpu", "triton")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_against_float64(case: Case) -> None:
    check(case, torch.float64, "cpu", "torch")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_kernel_on_gpu(dtype: torch.dtype) -> None:
    for case in (*CASES, Case(16, 2048, ((4096, "none"), (1536, "none"), (96, "sigmoid")))):
        check(case, dtype, "cuda", "triton")
    check(Case(33, 2048, ((5632, "swiglu"),)), dtype, "cuda", "triton")
    check(Case(32, 4096, ((2048, "none"),), is_normed=False), dtype, "cuda", "triton")
    check(Case(2, 5632, ((2048, "none"),), is_normed=False, is_added=True), dtype, "cuda", "triton")


def test_a_row_hangs_on_no_other() -> None:
    weight = draw(48, 128, seed=1).float()
    x = draw(16, 128, seed=2).float()
    norm = RmsNorm(draw(128, seed=3).float(), 1e-5)

    def run(rows: Tensor) -> Tensor:
        return project(rows, [Projection(weight)], norm=norm, backend="triton")[0]

    assert torch.equal(run(x)[3:4], run(x[3:4]))
    assert run(x[:0]).shape == (0, 48)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_gradients(backend: Any) -> None:
    x = draw(3, 16, seed=1).float().requires_grad_()
    assert not project(x, [Projection(x[:2].detach())], backend=backend)[0].requires_grad


@pytest.mark.parametrize("is_alone", [True, False])
def test_plans_fill_a_gpu(is_alone: bool) -> None:
    shared = 227 * 2**10 if is_alone else 60 * 2**10
    for outputs in ([4096, 1536, 96], [5632], [2048]):
        for rows in (1, 16, 32, 64):
            is_swiglu = len(outputs) == 1
            options: Any = {"is_swiglu": is_swiglu, "is_alone": is_alone}
            launch = plan(rows, 2048, outputs, 2, **options)
            assert sum(-(-n // launch.outputs) for n in outputs) >= 88
            assert launch.rows >= rows
            assert launch.parts == 1
            tile_bytes = 2 * launch.channels * (launch.outputs * (1 + is_swiglu) + launch.rows)
            assert shared // 3 < (launch.num_stages + 1) * tile_bytes <= shared
    assert plan(64, 24, [8], 4).channels == 32


def test_programs_share_what_is_narrow() -> None:
    launch = plan(16, 4096, [2048], 2, is_alone=True, can_share=True)
    assert (launch.outputs, launch.parts, launch.channels) == (64, 4, 256)
    assert plan(16, 2048, [4096, 1536, 96], 2, is_alone=True, can_share=True).parts == 1
    # Fewer channels than would fill a GPU: the tile is cut too.
    small = plan(16, 128, [96], 4, can_share=True)
    assert (small.outputs, small.parts) == (16, 4)


def test_bad_input() -> None:
    x = torch.zeros(2, 16)
    layer = Projection(torch.zeros(8, 16))
    for layers, message in (
        ([], "projections must be one to three, got 0"),
        ([Projection(torch.zeros(8, 15))], r"projections\[0\].weight must have shape \[N, D\]"),
        ([layer, Projection(layer.weight.double())], r"projections\[1\].weight is torch.float64"),
        ([Projection(layer.weight, torch.zeros(7))], r"projections\[0\].bias must have shape"),
        ([Projection(torch.zeros(16, 8).T)], r"projections\[0\].weight must be contiguous"),
        ([Projection(torch.zeros(7, 16), None, "swiglu")], "even number of rows"),
        ([layer, Projection(layer.weight, None, "swiglu")], "no other projection beside it"),
        ([Projection(layer.weight, None, "gelu")], "activation='gelu' is not one of"),  # pyright: ignore
    ):
        with pytest.raises(ValueError, match=message):
            project(x, layers)
    with pytest.raises(ValueError, match=r"norm\.weight must have shape"):
        project(x, [layer], norm=RmsNorm(torch.zeros(8), 1e-5))
    with pytest.raises(ValueError, match="residual must have shape"):
        project(x, [layer], residual=torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"tallies must be int32 \[128\] on cpu, .*int64 \[128\]"):
        project(x, [layer], tallies=new_tallies("cpu").long())
    for tallies, message in (
        (new_tallies("cpu") + 1, "tallies must be zeros"),
        (torch.zeros(1, dtype=torch.int32).expand(128), "tallies must be contiguous"),
        ([0] * 128, "tallies must be a torch.Tensor, got list"),
    ):
        with pytest.raises(ValueError, match=message):
            project(x, [layer], tallies=tallies)  # pyright: ignore
    for given, kinds in (([layer.weight], "Tensor"), (layer, "Projection")):
        with pytest.raises(ValueError, match=f"must be a list of Projection, got {kinds}"):
            project(x, given)  # pyright: ignore
    with pytest.raises(ValueError, match="norm must be an RmsNorm, got Tensor"):
        project(x, [layer], norm=torch.ones(16))  # pyright: ignore
    with pytest.raises(ValueError, match=r"norm\.eps=nan must be a number from 0 on"):
        project(x, [layer], norm=RmsNorm(torch.ones(16), float("nan")))
    with pytest.raises(ValueError, match="residual needs a single projection, got 2"):
        project(x, [layer, layer], residual=torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"x has dtype torch\.int64"):
        project(x.long(), [layer])
    with pytest.raises(ValueError, match="no float64"):
        project(x.double(), [Projection(layer.weight.double())], backend="triton")
