"""What every kernel test gets: fresh memory full of NaN, a backend and a device to run on."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.kernels.cases import Target

_POISON_INT = -(2**30)


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap an allocator so that nsa_kernels gets memory in which an unwritten cell shows."""

    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        fresh = make(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not caller.startswith("nsa_kernels") or torch.compiler.is_compiling():
            return fresh
        if fresh.dtype.is_floating_point:
            return fresh.fill_(float("nan"))
        return fresh if fresh.dtype == torch.bool else fresh.fill_(_POISON_INT)

    return allocate


@pytest.fixture(autouse=True)
def nan_filled_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty, empty_like and new_empty called from nsa_kernels give NaN-filled memory."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CPU tensors reach the Triton kernels: tests/conftest.py imported them interpreted."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Keep torch to at most two threads: the tests share the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2))
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def shared_gpu() -> Iterator[None]:
    """Give GPU memory back after each test: several workers test on one GPU."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture(
    params=["torch", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def target(request: pytest.FixtureRequest) -> Target:
    """Where a shared case runs: torch on the CPU, Triton interpreted, Triton on a GPU."""
    if request.param == "torch":
        return Target(backend="torch", device="cpu")
    if request.param == "interpreter":
        if torch.cuda.is_available():
            pytest.skip("kernels imported for the GPU do not run in the interpreter")
        return Target(backend="triton", device="cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return Target(backend="triton", device="cuda")


@pytest.fixture
def fp8_device(device: str) -> str:
    """The device of a GPU test that needs fp8."""
    if not torch.version.hip and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU of compute capability 8.9 or later")
    return device


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """cuda for tests marked gpu (skipped where there is none), else cpu."""
    if "target" in request.fixturenames:
        return request.getfixturevalue("target").device
    if request.node.get_closest_marker("gpu") is None:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return "cuda"
