"""Ablations of NSA: a branch left out is a gate of 0, and no gates are gates of 1."""

import pytest
import torch

from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.probe import Probe

FREE = {"branch_kv": "shared", "compression": "mean"}
ABLATIONS = {
    "window only": {"branches": ["sliding"]},
    "cmp+win": {"branches": ["sliding", "compressed"]},
    "slc+win": {"branches": ["selected", "sliding"], **FREE},
    "no gates": {"gates": "none"},
    "cmp+slc, no gates": {"branches": ["compressed", "selected"], "gates": "none"},
}
ORDER = ("compressed", "selected", "sliding")
IDS = torch.randint(0, 61, (83,), generator=torch.Generator().manual_seed(0))
INPUTS = PackedInputs.from_lengths([53, 30])


@pytest.fixture(params=ABLATIONS)
def attention(request):
    return ABLATIONS[request.param]


def whole_model(attention, make_config, make_model, ablated):
    """All branches and gates, the gates pinned to what the ablation says; the same weights."""
    rest = {key: value for key, value in attention.items() if key not in ("branches", "gates")}
    model = make_model(make_config(rest), dtype=torch.float64)
    model.load_state_dict(ablated.state_dict(), strict=False)
    is_open = [branch in attention.get("branches", ORDER) for branch in ORDER]
    for layer in model.layers:
        weight = layer.attention.gate.weight.data.view(-1, 3, 32)
        bias = layer.attention.gate.bias.data.view(-1, 3)
        for column, is_kept in enumerate(is_open):
            if not is_kept or "gates" in attention:
                weight[:, column] = 0
                bias[:, column] = 1e4 if is_kept else -1e4
    return model


def test_an_ablation_is_the_whole_with_its_gates_pinned(attention, make_config, make_model):
    ablated = make_model(make_config(attention), dtype=torch.float64)
    whole = whole_model(attention, make_config, make_model, ablated)
    with torch.no_grad():
        out, wanted = (model(IDS, INPUTS).hidden for model in (ablated, whole))
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    complete = make_model(make_config({k: v for k, v in attention.items() if k in FREE}))
    assert (complete.double()(IDS, INPUTS).hidden - out).abs().max() > 1e-3


def test_branches_left_out_get_no_gradient_and_the_others_do(attention, make_config, make_model):
    model = make_model(make_config(attention), dtype=torch.float64)
    model(IDS, INPUTS).hidden.square().sum().backward()
    kept = attention.get("branches", ORDER)
    for layer in model.layers:
        weights = layer.attention.key_value.weight.grad
        if "branch_kv" not in attention:
            keys, values = weights.split([3 * 2 * 16, 3 * 2 * 8])
            for part in (keys, values):
                seen = [bool(of_branch.abs().sum() > 0) for of_branch in part.chunk(3)]
                assert seen == [branch in kept for branch in ORDER]
        else:
            assert weights.abs().sum() > 0
        if layer.attention.gate is not None:
            columns = layer.attention.gate.weight.grad.view(-1, 3, 32).abs().sum((0, 2))
            assert [bool(x > 0) for x in columns] == [branch in kept for branch in ORDER]


def test_a_window_only_model_sees_no_further_than_its_windows(make_config, make_model):
    model = make_model(make_config({"branches": ["sliding"]}))
    other = IDS.clone()
    other[0] = (other[0] + 1) % 61
    inputs = PackedInputs.from_lengths([len(IDS)])
    with torch.no_grad():
        before, after = model(IDS, inputs).hidden, model(other, inputs).hidden
    # Two layers, each with a window of 12 tokens, its own included.
    assert torch.equal(before[2 * 11 + 1 :], after[2 * 11 + 1 :])
    assert not torch.equal(before[11], after[11])


def test_the_probe_reports_the_gates_as_they_are(make_config, make_model):
    probe = Probe()
    model = make_model(make_config({"branches": ["compressed", "sliding"], "gates": "none"}))
    model(IDS, PackedInputs.from_lengths([len(IDS)], probe=probe))
    assert probe.summary()[0].gate_mean == {"cmp": 1.0, "slc": 0.0, "win": 1.0}
