"""Rotary positions and YaRN, against the formulas of the papers."""

import math

import pytest
import torch

from nsa_platform.model.rotary import attention_scale, inverse_frequencies, rotation_of

CPU = torch.device("cpu")


def test_rotation_turns_each_pair_by_position_times_frequency(make_config):
    config = make_config()
    x = torch.randn(3, 2, 16, dtype=torch.float64)
    positions = torch.tensor([0, 5, 1_000_003], dtype=torch.int32)
    turned = rotation_of(positions, config, dtype=torch.float64).apply(x)
    for t, position in enumerate(positions.tolist()):
        for pair in range(8):
            angle = position * 10000.0 ** (-2 * pair / 16)
            a, b = x[t, :, pair], x[t, :, pair + 8]
            c, s = math.cos(angle), math.sin(angle)
            torch.testing.assert_close(turned[t, :, pair], a * c - b * s)
            torch.testing.assert_close(turned[t, :, pair + 8], b * c + a * s)


def test_scores_depend_on_the_distance_alone_even_far_out(make_config):
    config = make_config()
    q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 16)

    def score(query_at: int, key_at: int) -> float:
        at = [rotation_of(torch.tensor([p]), config, dtype=q.dtype) for p in (query_at, key_at)]
        return float((at[0].apply(q) * at[1].apply(k)).sum())

    assert score(1_000_007, 1_000_000) == pytest.approx(score(7, 0), abs=1e-4)


def test_rotation_keeps_the_dtype(make_config):
    rotation = rotation_of(torch.arange(4), make_config(), dtype=torch.bfloat16)
    assert rotation.cos.dtype == torch.float32
    assert rotation.apply(torch.randn(4, 2, 16).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotation_and_its_gradient_against_complex_numbers(make_config, dtype):
    """Also with axes before the tokens and from a tensor that is a part of another."""
    rotation = rotation_of(torch.tensor([0, 3, 70, 1000]), make_config(), dtype=dtype)
    whole = torch.randn(4, 7, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(3, 4, 2, 16, dtype=dtype)

    turned = rotation.apply(whole[:, 1:].unflatten(1, (3, 2)).transpose(0, 1))
    assert turned.shape == weight.shape and turned.dtype == dtype and turned.is_contiguous()
    (grad,) = torch.autograd.grad((turned * weight).sum(), whole)

    exact = whole.detach().double().requires_grad_(True)
    first, second = exact[:, 1:].unflatten(1, (3, 2)).transpose(0, 1).chunk(2, -1)
    angle = torch.complex(rotation.cos.double(), rotation.sin.double())[:, None]
    wanted = torch.view_as_real(torch.complex(first, second) * angle).movedim(-1, -2).flatten(-2)
    (wanted_grad,) = torch.autograd.grad((wanted * weight.double()).sum(), exact)
    torch.testing.assert_close(turned, wanted.to(dtype))
    torch.testing.assert_close(grad, wanted_grad.to(dtype))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_rotation_is_the_same(make_config):
    rotation = rotation_of(torch.arange(5), make_config(), dtype=torch.bfloat16)
    x = torch.randn(5, 2, 16).bfloat16().requires_grad_(True)
    weight = torch.randn(5, 2, 16).bfloat16()
    plain = rotation.apply(x)
    torch._dynamo.reset()
    compiled = torch.compile(rotation.apply, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, plain)
    (wanted,) = torch.autograd.grad((plain * weight).sum(), x)
    (grad,) = torch.autograd.grad((compiled * weight).sum(), x)
    torch.testing.assert_close(grad, wanted)


def test_yarn_leaves_fast_pairs_interpolates_slow_ones_and_ramps_between(make_config):
    factor, original = 4.0, 256
    config = make_config(yarn={"factor": factor, "original_context": original})
    found = inverse_frequencies(config, device=CPU).tolist()
    kinds = set()
    for pair, frequency in enumerate(found):
        theta = 10000.0 ** (-2 * pair / 16)
        turns = original / (2 * math.pi / theta)
        if turns < 1.0:
            wanted, kind = theta / factor, "slow"
        elif turns > 32.0:
            wanted, kind = theta, "fast"
        else:
            gamma = (turns - 1.0) / (32.0 - 1.0)
            wanted, kind = (1 - gamma) * theta / factor + gamma * theta, "between"
        kinds.add(kind)
        assert frequency == pytest.approx(wanted, rel=1e-12)
    assert kinds == {"slow", "fast", "between"}


def test_yarn_raises_the_temperature_of_the_scores(make_config):
    plain = make_config()
    yarn = make_config(yarn={"factor": 4.0, "original_context": 64})
    assert attention_scale(plain) == pytest.approx(1 / 4)
    assert attention_scale(yarn) == pytest.approx((0.1 * math.log(4.0) + 1) ** 2 / 4)
    assert attention_scale(make_config(yarn={"factor": 1.0, "original_context": 64})) == 1 / 4
    given = {"factor": 4.0, "original_context": 64, "attention_factor": 2.0}
    assert attention_scale(make_config(yarn=given)) == 1.0
