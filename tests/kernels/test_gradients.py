"""Gradients by finite differences, and which branch trains the compression."""

import pytest
import torch
from torch import Tensor

import nsa_kernels
from nsa_kernels import NsaConfig
from tests.kernels.cases import Inputs, make_inputs
from tests.kernels.judge import call, op_inputs, reference_blocks

TINY = NsaConfig(4, 2, 4, 3, 1, 1, 5)


def tiny(lengths: list[int]) -> Inputs:
    return make_inputs(
        lengths,
        config=TINY,
        groups=2,
        heads_per_group=2,
        key_width=3,
        value_width=2,
        dtype=torch.float64,
    ).require_grad()


@pytest.mark.parametrize("lengths", [[19], [3, 0, 11, 6]], ids=str)
@pytest.mark.parametrize("op", ["compressed", "selected", "sliding", "full"])
def test_gradcheck(op: str, lengths: list[int]) -> None:
    """Finite differences of out and lse; selected attention with its blocks held fixed."""
    inputs = tiny(lengths)
    blocks = reference_blocks(inputs)
    tensors = op_inputs(op, inputs)
    names = [name for name, tensor in tensors.items() if tensor.numel()]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        changed = {**tensors, **dict(zip(names, values, strict=True))}
        fields = {"k": "k_slc" if op == "selected" else "k_win"}
        fields["v"] = fields["k"].replace("k", "v", 1)
        for name, value in changed.items():
            setattr(inputs, fields.get(name, name), value)
        out, *lse = call(nsa_kernels, op, inputs, blocks, backend="torch")
        return out, *(value[value.isfinite()] for value in lse)

    assert torch.autograd.gradcheck(run, [tensors[name] for name in names])


def test_frozen_choice_of_the_whole_op() -> None:
    """Finite differences of nsa_attention too, steps being too small to change a choice."""
    inputs = tiny([15])

    def run(*values: Tensor) -> Tensor:
        return nsa_kernels.nsa_attention(*values, config=TINY, backend="torch")

    assert torch.autograd.gradcheck(run, inputs.tensors, fast_mode=True)


def test_compression_is_trained_by_its_own_branch_only() -> None:
    """k_cmp decides the selection, yet has a gradient iff the compressed branch is mixed in."""
    inputs = make_inputs([100], dtype=torch.float64)
    for gates, trained in (((0.0, 0.7, 0.4), False), ((0.3, 0.0, 0.0), True)):
        inputs.gates = torch.tensor(gates, dtype=torch.float64).expand(100, 4, 3)
        for tensor in (inputs.k_cmp, inputs.v_cmp):
            tensor.requires_grad_(True)
        out = nsa_kernels.nsa_attention(*inputs.tensors, config=inputs.config, backend="torch")
        for gradient in torch.autograd.grad(out.square().sum(), (inputs.k_cmp, inputs.v_cmp)):
            assert bool(gradient.any()) is trained


def test_unused_lse_and_unused_out() -> None:
    """Either output alone can be differentiated."""
    inputs = make_inputs([40], dtype=torch.float64).require_grad()
    tensors = (inputs.q, inputs.k_cmp, inputs.v_cmp)
    out, lse = call(nsa_kernels, "compressed", inputs, backend="torch")
    both = torch.autograd.grad((out, lse), tensors, (out.detach(), torch.ones_like(lse)))
    out, lse = call(nsa_kernels, "compressed", inputs, backend="torch")
    first = torch.autograd.grad(out, tensors, out.detach())
    _, lse = call(nsa_kernels, "compressed", inputs, backend="torch")
    second = torch.autograd.grad(lse, tensors, torch.ones_like(lse))
    for total, one, other in zip(both, first, second, strict=True):
        assert torch.allclose(total, one + other)
    assert torch.equal(second[2], torch.zeros_like(second[2]))


def test_an_empty_row_passes_no_gradient() -> None:
    """Queries without a compressed block ignore whatever gradient reaches their out and lse."""
    inputs = make_inputs([30], dtype=torch.float64).require_grad()
    out, lse = call(nsa_kernels, "compressed", inputs, backend="torch")
    dout, dlse = torch.zeros_like(out), torch.zeros_like(lse)
    dout[:7], dlse[:7] = 1.0, torch.inf
    tensors = (inputs.q, inputs.k_cmp, inputs.v_cmp)
    for gradient in torch.autograd.grad((out, lse), tensors, (dout, dlse)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_backward_twice_gives_the_same_bits() -> None:
    inputs = make_inputs([200, 31]).require_grad()
    gradients = []
    for _ in range(2):
        out = nsa_kernels.nsa_attention(
            *inputs.tensors, config=inputs.config, cu_seqlens=inputs.cu_seqlens, backend="torch"
        )
        gradients.append(torch.autograd.grad(out.square().sum(), inputs.tensors))
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)
