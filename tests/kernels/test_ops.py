"""Every op against the float64 reference: outputs and gradients, over awkward sizes."""

from dataclasses import dataclass

import pytest
import torch

import nsa_kernels
from nsa_kernels import NsaConfig
from tests.kernels.cases import (
    CONFIGS,
    DENSE_STRIDE,
    EQUAL_BLOCKS,
    PAPER,
    SMALL,
    Target,
    assert_close,
    make_inputs,
)
from tests.kernels.judge import OPS, call, judge, reference_blocks

TORCH = Target(backend="torch", device="cpu")


@dataclass(frozen=True)
class Case:
    """One shape to try."""

    lengths: list[int]
    config: NsaConfig = SMALL
    groups: int = 2
    heads_per_group: int = 2
    key_width: int = 16
    value_width: int = 16

    def __str__(self) -> str:
        lengths = "+".join(map(str, self.lengths))
        heads = f"G{self.groups}R{self.heads_per_group}K{self.key_width}V{self.value_width}"
        return f"T{lengths}-l{self.config.compression_block_size}-{heads}"


def boundaries(config: NsaConfig) -> list[int]:
    """Lengths at which a block begins, is complete, or has just been passed."""
    l, b = config.compression_block_size, config.selection_block_size
    return sorted({1, l - 1, l, l + 1, b - 1, b + 1, 47})


PACKED = [5, 61, 0, 1, 33, 7]
CASES = [
    *(Case([length], config) for config in CONFIGS.values() for length in boundaries(config)),
    *(Case([333], config) for config in CONFIGS.values()),
    *(Case(PACKED, config) for config in CONFIGS.values()),
    Case([130], PAPER),
    *(Case([70, 9], heads_per_group=heads) for heads in (1, 4, 16)),
    Case([47, 20], heads_per_group=3, key_width=24, value_width=10),
    Case([90], key_width=16, value_width=48, groups=1),
]
INTERPRETED = [
    Case([47], heads_per_group=4, key_width=16, value_width=32),
    Case([9, 0, 40], EQUAL_BLOCKS, groups=1, heads_per_group=1),
    Case([21, 3], DENSE_STRIDE, groups=1, heads_per_group=16, key_width=32),
]
COMPILED = [
    *(Case([length], heads_per_group=4, key_width=64, value_width=64) for length in (1, 7, 8, 47)),
    Case([333], PAPER, heads_per_group=16, key_width=192, value_width=128),
    Case([1000, 31, 0, 130], PAPER, heads_per_group=4, key_width=128, value_width=128),
    Case([333], DENSE_STRIDE, heads_per_group=1, key_width=64, value_width=128),
    Case(PACKED, EQUAL_BLOCKS, heads_per_group=16, key_width=64, value_width=64),
    Case([2100], PAPER, heads_per_group=4, key_width=64, value_width=64),
]


def check(op: str, case: Case, target: Target, dtype: torch.dtype, slack: float = 1.0) -> None:
    inputs = make_inputs(
        case.lengths,
        config=case.config,
        groups=case.groups,
        heads_per_group=case.heads_per_group,
        key_width=case.key_width,
        value_width=case.value_width,
        dtype=dtype,
        device=target.device,
    )
    judge(op, inputs, target, slack=slack)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_torch_backend(op: str, case: Case) -> None:
    check(op, case, TORCH, torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_torch_backend_keeps_float64(op: str) -> None:
    check(op, Case([61, 9]), TORCH, torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_torch_backend_takes_16_bits(op: str, dtype: torch.dtype) -> None:
    check(op, Case([61, 9]), TORCH, dtype)


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_triton_interpreted(op: str, case: Case) -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels imported for the GPU do not run in the interpreter")
    check(op, case, Target(backend="triton", device="cpu"), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", COMPILED, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_triton_compiled(op: str, case: Case, dtype: torch.dtype, device: str) -> None:
    check(op, case, Target(backend="triton", device=device), dtype)


@pytest.mark.parametrize("op", OPS)
def test_spare_compressed_rows_are_never_read(op: str) -> None:
    """k_cmp may have more rows than there are blocks: callers know only the bound T // d."""
    exact = make_inputs([47, 20])
    spare = make_inputs([47, 20], spare_blocks=5).require_grad()
    blocks = reference_blocks(exact)
    outputs = call(nsa_kernels, op, spare, blocks, backend="torch")
    for output, wanted in zip(
        outputs, call(nsa_kernels, op, exact, blocks, backend="torch"), strict=True
    ):
        assert_close(output, wanted, op)
    if op in ("compressed", "nsa"):
        dk, dv = torch.autograd.grad(outputs[0].sum(), (spare.k_cmp, spare.v_cmp))
        for gradient in (dk, dv):
            assert gradient.isfinite().all()
            assert torch.equal(gradient[-5:], torch.zeros_like(gradient[-5:]))


@pytest.mark.parametrize("op", OPS)
def test_strided_inputs_are_accepted(op: str) -> None:
    inputs = make_inputs([47])
    blocks = reference_blocks(inputs)
    wanted = call(nsa_kernels, op, inputs, blocks, backend="torch")
    for name in ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates"):
        value = getattr(inputs, name)
        strided = value.transpose(0, 1).contiguous().transpose(0, 1)
        assert not strided.is_contiguous()
        setattr(inputs, name, strided)
    outputs = call(nsa_kernels, op, inputs, blocks, backend="torch")
    for output, expected in zip(outputs, wanted, strict=True):
        assert torch.equal(output, expected)


@pytest.mark.parametrize("op", OPS)
def test_scale_reaches_every_branch(op: str) -> None:
    inputs = make_inputs([61], dtype=torch.float64)
    scaled = make_inputs([61], dtype=torch.float64)
    scaled.q = inputs.q * 0.37
    blocks = reference_blocks(inputs)
    outputs = call(nsa_kernels, op, inputs, blocks, backend="torch", scale=0.37)
    for output, wanted in zip(
        outputs, call(nsa_kernels, op, scaled, blocks, backend="torch", scale=1.0), strict=True
    ):
        assert_close(output, wanted, op)


@pytest.mark.parametrize("op", OPS)
def test_none_is_one_sequence(op: str) -> None:
    inputs = make_inputs([61])
    blocks = reference_blocks(inputs)
    wanted = call(nsa_kernels, op, inputs, blocks, backend="torch")
    tensors = make_inputs([61])
    tensors.cu_seqlens = None  # type: ignore[assignment]
    for output, expected in zip(
        call(nsa_kernels, op, tensors, blocks, backend="torch"), wanted, strict=True
    ):
        assert torch.equal(output, expected)


@pytest.mark.parametrize("op", OPS)
def test_no_tokens(op: str) -> None:
    inputs = make_inputs([0, 0]).require_grad()
    blocks = torch.empty(0, 2, SMALL.num_selected_blocks, dtype=torch.int32)
    outputs = call(nsa_kernels, op, inputs, blocks, backend="torch")
    assert outputs[0].shape == (0, 4, 16)
    outputs[0].sum().backward()
