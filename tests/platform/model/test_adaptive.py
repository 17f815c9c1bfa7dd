"""Adaptive n against its rule, stated query by query on the reference's importance."""

import pytest
import torch

from nsa_kernels import NsaConfig, compressed_attention, reference, select_blocks
from nsa_platform.model.adaptive import keep_top_p
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.probe import Probe

CONFIG = NsaConfig(8, 4, 16, 6, 1, 2, 12)
LENGTHS = [190, 40, 7]
SCALE = 0.6


def kept_by_rule(importance, chosen, t, top_p):
    """One query and group: forced blocks, then the most important until top_p is held."""
    total, own = float(importance.sum()), t // CONFIG.selection_block_size
    chosen = [j for j in chosen if j >= 0]
    forced = [j for j in chosen if j < 1 or j > own - CONFIG.num_local_blocks]
    held, kept = sum(float(importance[j]) for j in forced), list(forced)
    for j in sorted(set(chosen) - set(forced), key=lambda j: (-float(importance[j]), j)):
        if total and held / total >= top_p:
            break
        kept.append(j)
        held += float(importance[j])
    return sorted(kept)


@pytest.fixture(scope="module")
def inputs():
    noise = torch.Generator().manual_seed(4)
    packed = PackedInputs.from_lengths(LENGTHS)
    q = 2 * torch.randn(sum(LENGTHS), 4, 16, generator=noise)
    counts = [(length - 8) // 4 + 1 if length >= 8 else 0 for length in LENGTHS]
    k_cmp = torch.randn(sum(counts), 2, 16, generator=noise)
    sizes = {"config": CONFIG, "cu_seqlens": packed.cu_seqlens, "scale": SCALE}
    _, lse = compressed_attention(q, k_cmp, k_cmp, **sizes)
    return q, k_cmp, lse, packed, counts, sizes


@pytest.mark.parametrize("top_p", [0.3, 0.8, 1.0])
def test_equals_the_rule(inputs, top_p, monkeypatch):
    q, k_cmp, lse, packed, counts, sizes = inputs
    monkeypatch.setattr("nsa_platform.model.adaptive.CHANNELS_AT_ONCE", 0)  # many tiles
    blocks = select_blocks(q, k_cmp, lse, **sizes)
    kept = keep_top_p(blocks, q, k_cmp, lse, top_p=top_p, positions=packed.positions, **sizes)
    parts = zip(
        *(x.split(LENGTHS) for x in (q, lse, blocks, kept)), k_cmp.split(counts), strict=True
    )
    sizes_read = set()
    for queries, sums, chosen, found, keys in parts:
        importance = reference.block_importance(queries, keys, sums, config=CONFIG, scale=SCALE)
        for t in range(len(queries)):
            for g in range(2):
                wanted = kept_by_rule(importance[t, g], chosen[t, g].tolist(), t, top_p)
                assert found[t, g].tolist() == wanted + [-1] * (6 - len(wanted)), (t, g)
                sizes_read.add(len(wanted))
    assert top_p == 1.0 or len(sizes_read) > 3


def test_texts_without_a_compressed_block_keep_all():
    packed = PackedInputs.from_lengths([7, 3])
    q, k_cmp, lse = torch.randn(10, 4, 16), torch.empty(0, 2, 16), torch.full((10, 4), -torch.inf)
    sizes = {"config": CONFIG, "cu_seqlens": packed.cu_seqlens, "scale": SCALE}
    blocks = select_blocks(q, k_cmp, lse, **sizes)
    kept = keep_top_p(blocks, q, k_cmp, lse, top_p=0.3, positions=packed.positions, **sizes)
    assert (blocks >= 0).any() and kept.equal(blocks)


def test_a_model_reads_fewer_blocks_and_learns(make_config, make_model):
    ids, found = torch.arange(120) % 61, {}
    for top_p in (None, 1.0, 0.3):
        model = make_model(make_config({"selection_top_p": top_p, "num_local_blocks": 1}))
        probe = Probe()
        hidden = model(ids, PackedInputs.from_lengths([120], probe=probe)).hidden
        hidden.square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        found[top_p] = hidden.detach(), probe.summary()[0].selected_blocks
    every, share_of_all, few = found.values()
    torch.testing.assert_close(every[0], share_of_all[0], rtol=1e-4, atol=1e-4)
    # 15 blocks of 8: a query has 1 to 15 of them to choose from, and reads 4 at most.
    assert every[1] == pytest.approx((1 + 2 + 3 + 4 * 12) / 15)
    assert few[1] < every[1] - 0.3
    assert not torch.allclose(few[0], every[0], atol=1e-3)
