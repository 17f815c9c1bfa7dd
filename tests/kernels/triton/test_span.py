"""Span attention in Triton: compressed, sliding and full, forward and backward."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_kernels import NsaConfig, reference, triton_backend
from nsa_kernels.shapes import compressed_cu_seqlens
from nsa_kernels.triton_backend.span_backward import span_gradients
from nsa_kernels.triton_backend.span_dkv import dkv_tiles
from nsa_kernels.triton_backend.span_dq import dq_tiles
from nsa_kernels.triton_backend.span_forward import (
    Span,
    compressed_span,
    full_span,
    sliding_span,
    span_forward,
    span_forward_tiles,
)
from nsa_kernels.triton_backend.tiles import split_width
from tests.kernels.cases import (
    DENSE_STRIDE,
    EQUAL_BLOCKS,
    PAPER,
    SMALL,
    Inputs,
    Target,
    assert_close,
    make_inputs,
    offsets,
)
from tests.kernels.judge import call, judge, op_inputs
from tests.kernels.triton.precision import assert_precise_dq, relative_error

SPANS = ("compressed", "sliding", "full")
INTERPRETER = Target(backend="triton", device="cpu")
# Sizes that are no power of two, and a window of one token.
ODD = NsaConfig(
    compression_block_size=12,
    compression_stride=6,
    selection_block_size=24,
    num_selected_blocks=3,
    num_initial_blocks=1,
    num_local_blocks=1,
    window_size=1,
)
UNIT_STRIDE = NsaConfig(
    compression_block_size=3,
    compression_stride=1,
    selection_block_size=16,
    num_selected_blocks=2,
    num_initial_blocks=0,
    num_local_blocks=1,
    window_size=40,
)


@dataclass(frozen=True)
class Case:
    """One shape to try."""

    lengths: tuple[int, ...]
    config: NsaConfig = SMALL
    groups: int = 1
    heads_per_group: int = 1
    key_width: int = 16
    value_width: int = 16

    def __str__(self) -> str:
        lengths = "+".join(map(str, self.lengths))
        heads = f"G{self.groups}R{self.heads_per_group}K{self.key_width}V{self.value_width}"
        return f"T{lengths}-l{self.config.compression_block_size}-{heads}"


# l-1, l, l+1, l'-1, l'+1 of SMALL, an empty sequence and some shorter than l, in one packed batch.
EDGES = (7, 8, 0, 9, 1, 15, 17, 47, 3)
INTERPRETED = [
    Case((1,)),
    Case((7,)),
    Case(EDGES),
    Case((333,)),
    Case((60, 0, 35), EQUAL_BLOCKS, groups=2, heads_per_group=4),
    Case((5, 40), DENSE_STRIDE, heads_per_group=16, key_width=16, value_width=32),
    Case((13, 29), ODD, groups=2, heads_per_group=3, key_width=48, value_width=32),
    Case((40, 2), UNIT_STRIDE, heads_per_group=2, key_width=32, value_width=48),
]
COMPILED = [
    *INTERPRETED,
    Case((333,), PAPER, groups=2, heads_per_group=16, key_width=192, value_width=128),
    Case((1100, 31, 0, 530), PAPER, heads_per_group=16, key_width=128, value_width=128),
    Case((1023,), PAPER, groups=2, heads_per_group=4, key_width=64, value_width=64),
    Case((700, 300), PAPER, heads_per_group=6, key_width=256, value_width=256),
    Case((257,), PAPER, heads_per_group=64, key_width=128, value_width=128),
    Case((2048,), PAPER, heads_per_group=1, key_width=128, value_width=192),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(op: str, case: Case, target: Target, dtype: torch.dtype) -> None:
    inputs = make_inputs(
        list(case.lengths),
        config=case.config,
        groups=case.groups,
        heads_per_group=case.heads_per_group,
        key_width=case.key_width,
        value_width=case.value_width,
        dtype=dtype,
        device=target.device,
        spare_blocks=2,
    )
    judge(op, inputs, target)


@pytest.fixture
def interpreted() -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels imported for the GPU do not run in the interpreter")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("case", INTERPRETED, ids=str)
@pytest.mark.parametrize("op", SPANS)
def test_interpreted(op: str, case: Case) -> None:
    check(op, case, INTERPRETER, torch.float32)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("op", SPANS)
def test_interpreted_in_16_bits(op: str) -> None:
    """16-bit inputs take the wide tiles of the tensor cores."""
    check(op, Case((90, 70), PAPER, heads_per_group=2), INTERPRETER, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", COMPILED, ids=str)
@pytest.mark.parametrize("op", SPANS)
def test_compiled(op: str, case: Case, dtype: torch.dtype, device: str) -> None:
    check(op, case, Target(backend="triton", device=device), dtype)


def span_of(op: str, inputs: Inputs) -> Span:
    """Which keys the queries of op see."""
    if op == "full":
        return full_span(inputs.cu_seqlens)
    make = compressed_span if op == "compressed" else sliding_span
    return make(inputs.cu_seqlens, inputs.config)


def check_weight(op: str, case: Case, device: str, dtype: torch.dtype) -> None:
    """A weight on out's gradient may be given inside lse and delta instead."""
    inputs = make_inputs(
        list(case.lengths), config=case.config, groups=case.groups,
        heads_per_group=case.heads_per_group, key_width=case.key_width,
        value_width=case.value_width, dtype=dtype, device=device, spare_blocks=2,
    )  # fmt: skip
    exact = inputs.double()
    tensors = [tensor.requires_grad_(True) for tensor in op_inputs(op, exact).values()]
    out = call(reference, op, exact)[0]
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(out.shape[:2], generator=generator)
    dout = torch.randn(out.shape, generator=generator).to(dtype)
    weighed = dout.double() * weights[..., None].double()
    wanted = torch.autograd.grad(out, tensors, weighed)
    delta = (out * dout).sum(-1).detach().float().to(device)
    q, k, v = op_inputs(op, inputs).values()
    rest = (inputs.cu_seqlens, span_of(op, inputs), case.key_width**-0.5)
    _, lse = span_forward(q, k, v, *rest)
    lse = lse - weights.to(device).log()
    got = span_gradients(dout.to(device), q, k, v, lse, delta, *rest)
    for name, mine, right in zip(("dq", "dk", "dv"), got, wanted, strict=True):
        assert_close(mine, right, f"weighed {op} {name}")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", SPANS)
def test_lse_may_hold_a_weight(op: str, dtype: torch.dtype) -> None:
    check_weight(op, Case((13, 0, 69), ODD, 2, 3, 48, 32), "cpu", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", SPANS)
def test_lse_may_hold_a_weight_compiled(op: str, dtype: torch.dtype, device: str) -> None:
    check_weight(op, Case((1100, 31, 0, 530), PAPER, 2, 16, 128, 128), device, dtype)


def backward(op: str, dout: Tensor, dlse: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    """triton_backend's backward of op on (q, k, v, out, lse, cu_seqlens)."""
    scale = tensors[0].shape[-1] ** -0.5
    config = () if op == "full" else (PAPER,)
    return getattr(triton_backend, f"{op}_backward")(dout, dlse, *tensors, *config, scale)


def forward(op: str, *tensors: Any) -> tuple[Tensor, Tensor]:
    """triton_backend's forward of op on (q, k, v, cu_seqlens)."""
    scale = tensors[0].shape[-1] ** -0.5
    config = () if op == "full" else (PAPER,)
    return getattr(triton_backend, f"{op}_forward")(*tensors, *config, scale)


@pytest.mark.gpu
@pytest.mark.parametrize("op", SPANS)
def test_backward_repeats_bit_by_bit(op: str, device: str) -> None:
    inputs = make_inputs(
        [3000, 17, 1500], config=PAPER, groups=2, heads_per_group=16, key_width=128,
        value_width=128, dtype=torch.bfloat16, device=device,
    )  # fmt: skip
    keys = (inputs.k_cmp, inputs.v_cmp) if op == "compressed" else (inputs.k_win, inputs.v_win)
    out, lse = forward(op, inputs.q, *keys, inputs.cu_seqlens)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    runs = [
        backward(op, dout, dlse, inputs.q, *keys, out, lse, inputs.cu_seqlens) for _ in range(3)
    ]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("deviation", [8.0, 24.0, 60.0])
@pytest.mark.parametrize("op", SPANS)
def test_dq_is_precise_at_large_logits(op: str, deviation: float, device: str) -> None:
    inputs = make_inputs(
        [2000], config=PAPER, groups=1, heads_per_group=4, key_width=128, value_width=128,
        dtype=torch.bfloat16, device=device,
    )  # fmt: skip
    q = (inputs.q.float() * deviation).bfloat16()
    k, v = (inputs.k_cmp, inputs.v_cmp) if op == "compressed" else (inputs.k_win, inputs.v_win)
    out, lse = forward(op, q, k, v, inputs.cu_seqlens)
    torch.manual_seed(0)
    dout = torch.randn_like(out)
    dq, _, _ = backward(op, dout, torch.zeros_like(lse), q, k, v, out, lse, inputs.cu_seqlens)
    t = torch.arange(2000, device=device)[:, None]
    s = torch.arange(k.shape[0], device=device)
    visible = {
        "compressed": s * 16 + 31 <= t,
        "sliding": (s <= t) & (s > t - 512),
        "full": s <= t,
    }[op]
    assert_precise_dq(dq, (q, k[:, 0], v[:, 0], dout), visible, deviation)


LONG = 270_336
"""Tokens at which q of 64 heads of 128 has more than 2^31 elements."""


@pytest.mark.gpu
@pytest.mark.parametrize("op", SPANS)
def test_addresses_pass_32_bits(op: str, device: str) -> None:
    torch.manual_seed(0)
    cu_seqlens = offsets([LONG - 4100, 4100], device)
    num_keys = LONG
    if op == "compressed":
        num_keys = int(compressed_cu_seqlens(cu_seqlens, PAPER)[-1])
    make = {"dtype": torch.bfloat16, "device": device}
    q, dout = torch.randn(LONG, 64, 128, **make), torch.randn(LONG, 64, 128, **make)
    k, v = torch.randn(num_keys, 4, 128, **make), torch.randn(num_keys, 4, 128, **make)
    out, lse = forward(op, q, k, v, cu_seqlens)
    # The full backward would take a minute and shares its kernels with the others.
    dq = None
    if op != "full":
        dq, _, _ = backward(op, dout, torch.zeros_like(lse), q, k, v, out, lse, cu_seqlens)
    first_block = int(compressed_cu_seqlens(cu_seqlens, PAPER)[1])
    for t in (LONG - 4101, LONG - 4100 + 64, LONG - 1):
        start = 0 if t < LONG - 4100 else LONG - 4100
        position = t - start
        if op == "compressed":
            low = 0 if start == 0 else first_block
            high = low + (position - 31) // 16 + 1
        else:
            low = max(start, t - 511) if op == "sliding" else start
            high = t + 1
        keys, values = k[low:high].double(), v[low:high].double()
        row = q[t].double().view(4, 16, 128).requires_grad_(True)
        weights = (torch.einsum("grk,sgk->grs", row, keys) * 128**-0.5).softmax(-1)
        exact = torch.einsum("grs,sgv->grv", weights, values)
        assert relative_error(out[t].view_as(exact), exact.detach()) < 0.01
        if dq is not None:
            (exact_dq,) = torch.autograd.grad(exact, row, dout[t].double().view_as(exact))
            assert relative_error(dq[t].view_as(exact_dq), exact_dq) < 0.01


@pytest.mark.parametrize(
    ("width", "parts"),
    [
        (16, (16, 0)),
        (48, (32, 16)),
        (64, (64, 0)),
        (112, (128, 0)),
        (192, (128, 64)),
        (256, (256, 0)),
    ],
)
def test_widths_are_read_in_powers_of_two(width: int, parts: tuple[int, int]) -> None:
    assert split_width(width) == parts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 64, 128, 192, 256])
@pytest.mark.parametrize("heads", [1, 3, 16, 33, 64])
def test_a_tile_holds_whole_tokens(dtype: torch.dtype, width: int, heads: int) -> None:
    span = full_span(offsets([1]))
    for tiles in (
        span_forward_tiles(dtype, width, width, heads, span),
        dq_tiles(dtype, width, width, heads),
        dkv_tiles(dtype, width, width, heads),
    ):
        assert tiles.rows >= heads


def test_scale_must_be_positive() -> None:
    inputs = make_inputs([5])
    with pytest.raises(ValueError, match="scale=-1"):
        triton_backend.full_forward(inputs.q, inputs.k_win, inputs.v_win, inputs.cu_seqlens, -1.0)
