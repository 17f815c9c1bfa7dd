"""Where NSA must equal full attention exactly, and what no query may ever see."""

import dataclasses
from typing import Any

import pytest
import torch

import nsa_kernels
from nsa_kernels import NsaConfig
from tests.kernels.cases import SMALL, Inputs, Target, assert_close, make_inputs
from tests.kernels.judge import OPS, call, op_inputs, reference_blocks


def on_targets(values: list[Any], interpreted: list[Any]) -> list[Any]:
    """(target, value) for every value, and for these alone where the kernels are interpreted."""
    return [
        *(pytest.param("torch", value, id=f"torch-{value}") for value in values),
        *(pytest.param("interpreter", value, id=f"interpreter-{value}") for value in interpreted),
        *(
            pytest.param("cuda", value, id=f"cuda-{value}", marks=pytest.mark.gpu)
            for value in values
        ),
    ]


POSITIONS = on_targets([0, 6, 7, 30, 47, 63, 64, 90], [47])


def run_selected(inputs: Inputs, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Selected attention over the blocks that the target itself selects."""
    options: dict[str, Any] = {
        "config": inputs.config,
        "cu_seqlens": inputs.cu_seqlens,
        "backend": target.backend,
    }
    _, lse = nsa_kernels.compressed_attention(inputs.q, inputs.k_cmp, inputs.v_cmp, **options)
    blocks = nsa_kernels.select_blocks(inputs.q, inputs.k_cmp, lse, **options)
    return nsa_kernels.selected_attention(inputs.q, inputs.k_win, inputs.v_win, blocks, **options)


def wide(target: Target) -> dict[str, Any]:
    """Widths that a GPU has tensor cores for."""
    return {"key_width": 64, "value_width": 64} if target.device == "cuda" else {}


@pytest.mark.parametrize(
    ("target", "lengths"),
    on_targets([[16], [9], [16, 1, 5], [64], [40, 64]], [[16], [9], [16, 1, 5]]),
    indirect=["target"],
)
def test_few_blocks_select_everything(lengths: list[int], target: Target) -> None:
    """T <= l', and T <= n*l': every block is selected, so selected is full attention."""
    assert max(lengths) <= SMALL.num_selected_blocks * SMALL.selection_block_size
    inputs = make_inputs(lengths, device=target.device, **wide(target))
    out, _ = run_selected(inputs, target)
    (full,) = call(nsa_kernels, "full", inputs, backend=target.backend)
    assert_close(out, full, "selected")


def test_one_more_block_selects_less() -> None:
    """T = n*l' + 1: the last query misses a block, so the equality above is not vacuous."""
    inputs = make_inputs([65])
    target = Target(backend="torch", device="cpu")
    out, _ = run_selected(inputs, target)
    (full,) = call(nsa_kernels, "full", inputs, backend="torch")
    assert_close(out[:-1], full[:-1], "selected")
    assert (out[-1] - full[-1]).abs().max() > 1e-2


@pytest.mark.parametrize("lengths", [[24], [1], [23, 24, 3]], ids=str)
def test_short_sequences_fit_the_window(lengths: list[int], target: Target) -> None:
    inputs = make_inputs(lengths, device=target.device, **wide(target))
    out, _ = call(nsa_kernels, "sliding", inputs, backend=target.backend)
    (full,) = call(nsa_kernels, "full", inputs, backend=target.backend)
    assert_close(out, full, "sliding")


def test_one_token_more_than_the_window() -> None:
    inputs = make_inputs([25])
    out, _ = call(nsa_kernels, "sliding", inputs, backend="torch")
    (full,) = call(nsa_kernels, "full", inputs, backend="torch")
    assert_close(out[:-1], full[:-1], "sliding")
    assert (out[-1] - full[-1]).abs().max() > 1e-3


def changed_after(inputs: Inputs, token: int, config: NsaConfig) -> Inputs:
    """The same inputs with everything that comes after position `token` drawn anew."""
    other = make_inputs(
        [inputs.q.shape[0]],
        config=config,
        key_width=inputs.q.shape[2],
        value_width=inputs.v_win.shape[2],
        device=inputs.q.device.type,
        seed=99,
    )
    complete = max(0, (token + 1 - config.compression_block_size) // config.compression_stride + 1)
    mixed = {}
    for field in dataclasses.fields(Inputs):
        value, new = getattr(inputs, field.name), getattr(other, field.name)
        if field.name in ("cu_seqlens", "config"):
            mixed[field.name] = value
        else:
            kept = complete if field.name in ("k_cmp", "v_cmp") else token + 1
            mixed[field.name] = torch.cat([value[:kept], 5 * new[kept:]])
    return Inputs(**mixed)


@pytest.mark.parametrize(("target", "token"), POSITIONS, indirect=["target"])
@pytest.mark.parametrize("op", OPS)
def test_the_future_does_not_leak(op: str, token: int, target: Target) -> None:
    """Everything after `token` changes; the outputs up to it stay bit for bit the same."""
    length = 53 if target.is_interpreted else 101
    inputs = make_inputs([length], device=target.device, **wide(target))
    changed = changed_after(inputs, token, SMALL)
    before = call(nsa_kernels, op, inputs, reference_blocks(inputs), backend=target.backend)
    after = call(nsa_kernels, op, changed, reference_blocks(changed), backend=target.backend)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[: token + 1], new[: token + 1])
        assert not torch.equal(old, new)


@pytest.mark.parametrize(("target", "token"), POSITIONS, indirect=["target"])
@pytest.mark.parametrize("op", OPS)
def test_no_gradient_reaches_the_future(op: str, token: int, target: Target) -> None:
    """The loss is made of outputs up to `token`: gradients of all later inputs are exactly zero."""
    length = 53 if target.is_interpreted else 101
    inputs = make_inputs([length], device=target.device, **wide(target)).require_grad()
    outputs = call(nsa_kernels, op, inputs, reference_blocks(inputs), backend=target.backend)
    tensors = op_inputs(op, inputs)
    gradients = torch.autograd.grad(outputs[0][: token + 1].square().sum(), list(tensors.values()))
    complete = max(0, (token + 1 - 8) // 4 + 1)
    for name, gradient in zip(tensors, gradients, strict=True):
        kept = complete if name in ("k_cmp", "v_cmp") else token + 1
        assert torch.equal(gradient[kept:], torch.zeros_like(gradient[kept:])), name
        if name.startswith("v") and kept:
            assert gradient[:kept].abs().sum() > 0, name
