"""Span attention forward with key tiles read by tensor descriptors, and without."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_kernels import NsaConfig
from nsa_kernels.triton_backend import tiles
from nsa_kernels.triton_backend.span_forward import (
    Span,
    compressed_span,
    full_span,
    sliding_span,
    span_forward,
)
from tests.kernels.cases import Inputs, Target, make_inputs, offsets
from tests.kernels.judge import judge, op_inputs

INTERPRETER = Target(backend="triton", device="cpu")
# Long enough a window, and close enough compressed keys, for unmasked key tiles in short sequences.
CONFIG = NsaConfig(
    compression_block_size=4,
    compression_stride=2,
    selection_block_size=16,
    num_selected_blocks=2,
    num_initial_blocks=0,
    num_local_blocks=1,
    window_size=150,
)


@pytest.fixture(autouse=True)
def interpreted() -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels imported for the GPU do not run in the interpreter")


@pytest.fixture(params=[False, True], ids=["loads", "copies"])
def has_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Runs a test without and with a copy engine."""
    monkeypatch.setattr(tiles, "has_copy_engine", lambda _: request.param)
    return request.param


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The descriptors that were asked for."""
    made = []

    def recorded(rows: int, *tensors: Tensor) -> Any:
        made.append(tiles.descriptors(rows, *tensors))
        return made[-1]

    monkeypatch.setattr("nsa_kernels.triton_backend.span_forward.descriptors", recorded)
    return made


def draw(
    lengths: list[int], groups: int, widths: tuple[int, int], dtype: torch.dtype, spare: int = 0
) -> Inputs:
    """Inputs of four heads a group."""
    return make_inputs(
        lengths, config=CONFIG, groups=groups, heads_per_group=4, key_width=widths[0],
        value_width=widths[1], dtype=dtype, spare_blocks=spare,
    )  # fmt: skip


@pytest.mark.parametrize("widths", [(128, 128), (32, 128)], ids=str)
@pytest.mark.parametrize("op", ["compressed", "sliding"])
def test_key_tiles_by_descriptor(
    op: str, widths: tuple[int, int], has_engine: bool, made: list[Any]
) -> None:
    judge(op, draw([70, 0, 190], 2, widths, torch.float16, spare=2), INTERPRETER)
    assert made
    assert all((k is not None) == has_engine for k, _ in made)


@pytest.mark.usefixtures("has_engine")
@pytest.mark.parametrize(
    ("op", "width", "dtype"),
    [("sliding", 64, torch.float16), ("sliding", 128, torch.float32), ("full", 128, torch.float16)],
    ids=str,
)
def test_other_launches_ask_for_no_descriptors(
    op: str, width: int, dtype: torch.dtype, made: list[Any]
) -> None:
    judge(op, draw([9], 1, (width, width), dtype), INTERPRETER)
    assert not made


def test_keys_at_odd_addresses_are_loaded(monkeypatch: pytest.MonkeyPatch, made: list[Any]) -> None:
    """A view into a buffer need not start where the copy engine can."""
    monkeypatch.setattr(tiles, "has_copy_engine", lambda _: True)
    inputs = draw([190], 1, (128, 128), torch.float16)
    plain = span_forward(
        inputs.q, inputs.k_win, inputs.v_win, inputs.cu_seqlens, span_of("sliding", inputs), 0.1
    )
    buffer = torch.zeros(inputs.k_win.numel() + 1, dtype=torch.float16)
    odd = buffer[1:].view_as(inputs.k_win).copy_(inputs.k_win)
    again = span_forward(
        inputs.q, odd, inputs.v_win, inputs.cu_seqlens, span_of("sliding", inputs), 0.1
    )
    assert [k is not None for k, _ in made] == [True, False]
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("has_engine")
def test_keys_may_be_none_at_all() -> None:
    """Too few tokens for a compressed block; there is no descriptor of nothing."""
    q, k = torch.ones(3, 4, 128, dtype=torch.float16), torch.ones(0, 1, 128, dtype=torch.float16)
    cu_seqlens = offsets([3])
    span = compressed_span(cu_seqlens, CONFIG)
    out, lse = span_forward(q, k, k, cu_seqlens, span, 1.0)
    assert not out.any()
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


def span_of(op: str, inputs: Inputs) -> Span:
    if op == "full":
        return full_span(inputs.cu_seqlens)
    make = compressed_span if op == "compressed" else sliding_span
    return make(inputs.cu_seqlens, inputs.config)


@pytest.mark.usefixtures("has_engine")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("op", ["compressed", "sliding", "full"])
def test_keys_of_other_sequences_are_not_seen(op: str, poison: float) -> None:
    """Not even with a weight of 0, by which a value that is no number would come through."""
    inputs = draw([190, 190], 1, (128, 128), torch.float16)
    q, k, v = op_inputs(op, inputs).values()
    span = span_of(op, inputs)
    rest = (inputs.cu_seqlens, span, 128**-0.5)
    clean = span_forward(q, k, v, *rest)
    middle = int(span.cu_keys[1])
    pairs = ((slice(190), slice(middle, None)), (slice(190, None), slice(middle)))
    for mine, others in pairs:
        bad_k, bad_v = k.clone(), v.clone()
        bad_k[others], bad_v[others] = poison, poison
        for whole, found in zip(clean, span_forward(q, bad_k, bad_v, *rest), strict=True):
            assert torch.equal(found[mine], whole[mine])
