"""MoBA against a plain statement of its rule, for each query and head by itself."""

import pytest
import torch

from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.moba import mean_keys

BLOCK, TOP = 8, 3


def chosen_by_rule(q, k, t):
    """Blocks of one query and head: its own, and of those before it the best by mean key."""
    own = t // BLOCK
    scores = {b: float(q @ k[b * BLOCK : (b + 1) * BLOCK].mean(0)) for b in range(own)}
    best = sorted(scores, key=lambda b: (-scores[b], b))[: TOP - 1]
    return {own, *best}


def by_rule(q, k, v, scale):
    """One sequence, q [T, H, K] on k and v [T, G, ...]."""
    share = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=q.dtype)
    for t in range(len(q)):
        for h in range(q.shape[1]):
            keys, values = k[:, h // share], v[:, h // share]
            blocks = chosen_by_rule(q[t, h], keys, t)
            seen = [s for s in range(t + 1) if s // BLOCK in blocks]
            weights = (keys[seen] @ q[t, h] * scale).softmax(0)
            out[t, h] = weights @ values[seen]
    return out


@pytest.fixture
def module(make_config, make_model):
    return make_model(make_config({"kind": "moba"}), dtype=torch.float64).layers[0].attention


def test_equals_the_rule(module):
    lengths = [53, 6, 40]
    noise = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(99, heads, width, dtype=torch.float64, generator=noise)
        for heads, width in ((4, 16), (2, 16), (2, 8))
    )
    offsets = PackedInputs.from_lengths(lengths).cu_seqlens
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    wanted = torch.cat([by_rule(*each, module.scale) for each in parts])
    out = module._attend_rotated(q, k, v, offsets)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    means = mean_keys(k, offsets, module.kernel_config)
    torch.testing.assert_close(means[6], k[59:67].mean(0).float().double(), rtol=0, atol=1e-6)


def test_every_weight_learns(make_config, make_model):
    model = make_model(make_config({"kind": "moba"}))
    model(torch.arange(50), PackedInputs.from_lengths([50])).hidden.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
