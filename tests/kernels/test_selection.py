"""Selection on the torch backend: forced blocks, padding, ties, agreement with the reference."""

import pytest
import torch
from torch import Tensor

import nsa_kernels
from nsa_kernels import NsaConfig, reference
from tests.kernels.cases import CONFIGS, SMALL, Inputs, make_inputs
from tests.kernels.judge import call, reference_blocks


def select(inputs: Inputs) -> Tensor:
    """select_blocks on the torch backend, from the torch backend's own lse."""
    _, lse = call(nsa_kernels, "compressed", inputs, backend="torch")
    return nsa_kernels.select_blocks(
        inputs.q,
        inputs.k_cmp,
        lse,
        config=inputs.config,
        cu_seqlens=inputs.cu_seqlens,
        backend="torch",
    )


def integers(lengths: list[int], config: NsaConfig, values: int, seed: int = 0) -> Inputs:
    """Small-integer q and k_cmp: scores are exact in every dtype, and ties abound."""
    inputs = make_inputs(lengths, config=config, heads_per_group=4, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (inputs.q, inputs.k_cmp):
        tensor.copy_(torch.randint(-values, values + 1, tensor.shape, generator=generator))
    return inputs


@pytest.mark.parametrize("lengths", [[333], [1], [16, 17, 0, 200, 65]], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equals_the_reference(config: NsaConfig, lengths: list[int]) -> None:
    inputs = make_inputs(lengths, config=config, heads_per_group=3)
    assert torch.equal(select(inputs), reference_blocks(inputs))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("values", [0, 1, 2])
def test_ties_are_broken_as_in_the_reference(config: NsaConfig, values: int) -> None:
    """Keys that repeat: blocks weigh alike bit for bit, and the lower ones win."""
    inputs = integers([333], config, values)
    inputs.k_cmp.copy_(inputs.k_cmp[torch.arange(inputs.k_cmp.shape[0]) % 3])
    expected = reference_blocks(inputs)
    assert torch.equal(select(inputs), expected)
    single = inputs.double()
    _, lse = call(reference, "compressed", single)
    importance = reference.block_importance(single.q, single.k_cmp, lse, config=config)[-1, 0]
    assert importance.float().unique().numel() < importance.numel(), "no ties were made"


def test_equal_blocks_go_to_the_lower() -> None:
    """All keys equal: importance differs only at the rims, and the lowest blocks are taken."""
    config = NsaConfig(16, 16, 16, 4, 1, 1, 8)
    inputs = make_inputs([16 * 12], config=config)
    inputs.k_cmp.fill_(1.0)
    blocks = select(inputs)
    assert blocks[-1, 0].tolist() == [0, 1, 2, 11]
    assert blocks[16 * 7 + 15, 1].tolist() == [0, 1, 2, 7]
    assert torch.equal(blocks, reference_blocks(inputs))


@pytest.mark.parametrize("initial", [0, 1, 2])
@pytest.mark.parametrize("local", [1, 2, 3])
def test_forced_blocks_are_always_chosen(initial: int, local: int) -> None:
    config = NsaConfig(8, 4, 16, 6, initial, local, 24)
    blocks = select(make_inputs([333], config=config))
    for t in range(333):
        own = t // 16
        forced = {j for j in range(initial) if j <= own}
        forced |= {j for j in range(own - local + 1, own + 1) if j >= 0}
        for group in range(2):
            assert forced <= set(blocks[t, group].tolist())


def test_only_forced_blocks() -> None:
    """n = initial + local: nothing is left to importance."""
    config = NsaConfig(8, 4, 16, 3, 1, 2, 24)
    blocks = select(make_inputs([200], config=config))
    assert blocks[-1].tolist() == [[0, 11, 12], [0, 11, 12]]


def test_ascending_and_padded_at_the_end() -> None:
    n = SMALL.num_selected_blocks
    blocks = select(make_inputs([333, 40]))
    positions = torch.cat([torch.arange(333), torch.arange(40)])
    for t, position in enumerate(positions.tolist()):
        candidates = position // SMALL.selection_block_size + 1
        for group in range(2):
            row = blocks[t, group].tolist()
            picked = [block for block in row if block >= 0]
            assert row == sorted(set(picked)) + [-1] * (n - len(picked))
            assert len(picked) == min(n, candidates)
            assert max(picked) == candidates - 1
    assert blocks.dtype == torch.int32


def test_blocks_without_importance_fill_the_room() -> None:
    """Keys so unequal that all weight falls on one block: the others are chosen by number."""
    config = NsaConfig(16, 16, 16, 4, 0, 1, 8)
    inputs = make_inputs([16 * 10], config=config, groups=1, heads_per_group=1)
    inputs.q.fill_(1.0)
    inputs.k_cmp.fill_(-1000.0)
    inputs.k_cmp[5] = 1000.0
    blocks = select(inputs)
    assert blocks[-1, 0].tolist() == [0, 1, 5, 9]
    assert torch.equal(blocks, reference_blocks(inputs))


def test_groups_choose_for_themselves_from_all_their_heads() -> None:
    """Two heads of a group disagree: the group's choice is by the sum of their weights."""
    config = NsaConfig(16, 16, 16, 2, 0, 1, 8)
    inputs = make_inputs([16 * 6], config=config, groups=2, heads_per_group=2, key_width=2)
    inputs.k_cmp.zero_()
    inputs.k_cmp[1, :, 0] = 4.0
    inputs.k_cmp[3, :, 1] = 4.0
    inputs.q.zero_()
    inputs.q[:, 0, 0], inputs.q[:, 1, 1] = 3.0, 1.0
    inputs.q[:, 2, 0], inputs.q[:, 3, 1] = 1.0, 3.0
    blocks = select(inputs)
    assert blocks[-1].tolist() == [[1, 5], [3, 5]]


def test_the_same_twice() -> None:
    inputs = integers([333], SMALL, 1)
    assert torch.equal(select(inputs), select(inputs))


def test_no_gradient() -> None:
    inputs = make_inputs([100]).require_grad()
    assert not select(inputs).requires_grad
