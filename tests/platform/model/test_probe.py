"""The probe's figures, against brute force."""

import math

import pytest
import torch

from nsa_kernels import NsaConfig
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.probe import Probe, observe_selection

CONFIG = NsaConfig(
    compression_block_size=8,
    compression_stride=4,
    selection_block_size=8,
    num_selected_blocks=3,
    num_initial_blocks=1,
    num_local_blocks=1,
)


def test_selection_against_brute_force():
    length, scale = 61, 0.3
    q = torch.randn(length, 4, 16, dtype=torch.float64)
    k_cmp = torch.randn(length // 4, 2, 16, dtype=torch.float64)
    gates = torch.rand(length, 4, 3, dtype=torch.float64)
    probe = Probe()
    observe_selection(
        probe,
        5,
        q,
        k_cmp,
        gates=gates,
        positions=torch.arange(length, dtype=torch.int32),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        config=CONFIG,
        scale=scale,
    )
    health = probe.summary()[5]

    entropies, distances = [], []
    for t in range(length):
        visible = [i for i in range(length // 4) if i * 4 + 7 <= t]
        own, importance = t // 8, torch.zeros(2, t // 8 + 1, dtype=torch.float64)
        for head in range(4):
            if visible:
                p = (scale * k_cmp[visible, head // 2] @ q[t, head]).softmax(0)
                for i, share in zip(visible, p, strict=True):
                    for token in range(i * 4, i * 4 + 8):
                        importance[head // 2, token // 8] += share
                if len(visible) > 1:
                    entropies.append(float(-(p * p.log()).sum()) / math.log(len(visible)))
        for group in range(2):
            free = sorted(set(range(own + 1)) - {0, own}, key=lambda j: -importance[group, j])
            chosen = {0, own, *free[: 3 - len({0, own})]}
            distances += [own - j for j in chosen]
    assert health.selection_entropy == pytest.approx(sum(entropies) / len(entropies))
    buckets = [0 if d == 0 else d.bit_length() for d in distances]
    wanted = [buckets.count(k) / len(buckets) for k in range(max(buckets) + 1)]
    assert health.selected_distance == pytest.approx(wanted)
    assert list(health.gate_mean) == ["cmp", "slc", "win"]
    assert list(health.gate_mean.values()) == pytest.approx(gates.mean((0, 1)).tolist())


def test_a_forward_pass_is_unchanged_and_every_layer_reports(make_config, make_model):
    model = make_model(make_config())
    ids, probe = torch.arange(50), Probe()
    plain = model(ids, PackedInputs.from_lengths([30, 20])).hidden
    for _ in range(2):
        probed = model(ids, PackedInputs.from_lengths([30, 20], probe=probe)).hidden
        assert torch.equal(plain, probed)
    summary = probe.summary()
    assert list(summary) == [0, 1]
    for health in summary.values():
        assert sum(health.selected_distance) == pytest.approx(1.0)
        assert health.selection_entropy is not None and 0 < health.selection_entropy <= 1
    doubled = [tensor.clone() for tensor in probe.tensors()]
    once = Probe()
    model(ids, PackedInputs.from_lengths([30, 20], probe=once))
    for two, one in zip(doubled, once.tensors(), strict=True):
        torch.testing.assert_close(two, 2 * one)


def test_sequences_without_a_choice_have_no_entropy(make_config, make_model):
    probe = Probe()
    make_model(make_config())(torch.arange(11), PackedInputs.from_lengths([11], probe=probe))
    assert probe.summary()[0].selection_entropy is None


def test_gated_full_attention_reports_its_gate(make_config, make_model):
    probe = Probe()
    model = make_model(make_config({"kind": "full", "gated": True}))
    model(torch.arange(9), PackedInputs.from_lengths([9], probe=probe))
    assert list(probe.summary()[1].gate_mean) == ["full"]
    assert probe.summary()[1].selected_distance == []
