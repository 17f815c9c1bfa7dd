"""The judge itself: cases worked out by hand, Eq. 9 by counting tokens, causality by definition."""

import itertools
import math

import pytest
import torch

from nsa_kernels import NsaConfig, reference
from nsa_kernels.torch_backend.selection import fold_overlaps
from tests.kernels.cases import PAPER, make_inputs, offsets

# (l, d, l'): weight of compressed block j*l'/d + offset in the importance of block j.
EQUATION_9 = {
    (32, 16, 64): {-1: 1, 0: 2, 1: 2, 2: 2, 3: 1},
    (16, 8, 32): {-1: 1, 0: 2, 1: 2, 2: 2, 3: 1},
    (8, 4, 16): {-1: 1, 0: 2, 1: 2, 2: 2, 3: 1},
    (32, 16, 32): {-1: 1, 0: 2, 1: 1},
    (16, 16, 64): {0: 1, 1: 1, 2: 1, 3: 1},
    (32, 32, 64): {0: 1, 1: 1},
    (64, 16, 64): {-3: 1, -2: 2, -1: 3, 0: 4, 1: 3, 2: 2, 3: 1},
    (32, 8, 64): {-3: 1, -2: 2, -1: 3, 0: 4, 1: 4, 2: 4, 3: 4, 4: 4, 5: 3, 6: 2, 7: 1},
    (16, 8, 64): {-1: 1, **dict.fromkeys(range(7), 2), 7: 1},
    (32, 16, 128): {-1: 1, **dict.fromkeys(range(7), 2), 7: 1},
    (64, 64, 64): {0: 1},
}


def sized(l: int, d: int, b: int, n: int = 4) -> NsaConfig:
    return NsaConfig(l, d, b, n, 1, 2, 512)


@pytest.mark.parametrize("sizes", EQUATION_9, ids=str)
def test_overlap_is_equation_9(sizes: tuple[int, int, int]) -> None:
    l, d, b = sizes
    config = sized(*sizes)
    for j in range(5):
        tokens_of_block = set(range(j * b, (j + 1) * b))
        for i in range(6 * b // d):
            counted = len(tokens_of_block & set(range(i * d, i * d + l)))
            assert reference.overlap_tokens(i, j, config) == counted
            assert counted / d == EQUATION_9[sizes].get(i - j * b // d, 0)


@pytest.mark.parametrize("sizes", EQUATION_9, ids=str)
def test_torch_backend_folds_by_the_same_table(sizes: tuple[int, int, int]) -> None:
    _, d, b = sizes
    num_blocks = 4
    num_compressed = num_blocks * b // d
    folded = fold_overlaps(torch.eye(num_compressed), num_blocks, sized(*sizes))
    for j in range(num_blocks):
        for i in range(num_compressed):
            assert folded[i, j] == EQUATION_9[sizes].get(i - j * b // d, 0)


def test_equation_9_as_printed_counts_from_one() -> None:
    """sum over m, n of p[(l'/d) j - m - n], both j and p counted from 1, is the overlap."""
    config = sized(32, 16, 64)
    per_block, per_compressed = 4, 2
    for j in range(4):
        printed = [0] * 24
        for m in range(per_block):
            for n in range(per_compressed):
                from_one = per_block * (j + 1) - m - n
                if from_one >= 1:
                    printed[from_one - 1] += 1
        strides = [reference.overlap_tokens(i, j, config) // 16 for i in range(24)]
        assert printed == strides


def test_importance_worked_out_by_hand() -> None:
    """l=4, d=2, l'=8, T=16, one head, keys that give query 15 the weights 1:2:3:4:5:6:7."""
    config = NsaConfig(4, 2, 8, 2, 0, 1, 4)
    weights = torch.arange(1, 8, dtype=torch.float64)
    k_cmp = weights.log()[:, None, None]
    q = torch.ones(16, 1, 1, dtype=torch.float64)
    _, lse = reference.compressed_attention(q, k_cmp, k_cmp, config=config, scale=1.0)
    importance = reference.block_importance(q, k_cmp, lse, config=config, scale=1.0)
    # Blocks 0..3 start in [0, 8): 0, 1, 2 share both strides with it, 3 shares one; then 3 shares
    # one with [8, 16) and 4, 5, 6 share both.
    first = (2 * 1 + 2 * 2 + 2 * 3 + 4) / 28
    second = (4 + 2 * 5 + 2 * 6 + 2 * 7) / 28
    assert torch.allclose(importance[15, 0], torch.tensor([first, second], dtype=torch.float64))
    # Query 6 has seen blocks 0 and 1 (tokens 0..5): weights 1/3 and 2/3, both wholly in block 0.
    assert torch.allclose(importance[6, 0], torch.tensor([2.0, 0.0], dtype=torch.float64))
    assert importance[2, 0].tolist() == [0.0, 0.0]


def test_compressed_blocks_become_visible_when_complete() -> None:
    """l=32, d=16: tokens 0 to 30 see no block, 31 sees one, 47 sees two."""
    inputs = make_inputs([50], config=PAPER, groups=1, heads_per_group=1)
    inputs.q.zero_()
    out, lse = reference.compressed_attention(inputs.q, inputs.k_cmp, inputs.v_cmp, config=PAPER)
    assert torch.equal(out[:31], torch.zeros_like(out[:31]))
    assert torch.isneginf(lse[:31]).all()
    assert torch.equal(lse[31:47], torch.zeros_like(lse[31:47]))
    assert torch.allclose(out[46], inputs.v_cmp[0]) and torch.allclose(out[31], inputs.v_cmp[0])
    assert torch.allclose(lse[47:], torch.full_like(lse[47:], math.log(2)))
    assert torch.allclose(out[47], inputs.v_cmp.mean(0))


def test_window_is_exactly_w_tokens() -> None:
    config = NsaConfig(window_size=3)
    q, k = torch.zeros(6, 1, 1), torch.zeros(6, 1, 1)
    v = torch.tensor([1.0, 10, 100, 1000, 10000, 100000])[:, None, None]
    out, lse = reference.sliding_attention(q, k, v, config=config)
    assert torch.allclose(out.flatten(), torch.tensor([1.0, 5.5, 37, 370, 3700, 37000]), rtol=1e-5)
    assert torch.allclose(lse.flatten().exp(), torch.tensor([1.0, 2, 3, 3, 3, 3]))


def test_selected_tokens_by_hand() -> None:
    config = NsaConfig(2, 2, 2, 2, 0, 1, 4)
    q, k = torch.zeros(5, 1, 1), torch.zeros(5, 1, 1)
    v = torch.tensor([1.0, 2, 4, 8, 16])[:, None, None]
    blocks = torch.tensor([[0, -1], [0, -1], [1, 0], [-1, 1], [-1, -1]], dtype=torch.int32)
    out, lse = reference.selected_attention(q, k, v, blocks[:, None], config=config)
    assert torch.allclose(out.flatten(), torch.tensor([1.0, 1.5, 7 / 3, 6, 0]))
    assert torch.allclose(lse.flatten().exp(), torch.tensor([1.0, 2, 3, 2, 0]))


def test_full_attention_is_torchs() -> None:
    inputs = make_inputs([29], groups=2, heads_per_group=3, dtype=torch.float64)
    out = reference.full_attention(inputs.q, inputs.k_win, inputs.v_win)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        inputs.q.transpose(0, 1)[None],
        inputs.k_win.transpose(0, 1)[None],
        inputs.v_win.transpose(0, 1)[None],
        is_causal=True,
        enable_gqa=True,
    )
    assert torch.allclose(out, wanted[0].transpose(0, 1))


def test_packed_sequences_do_not_meet() -> None:
    """A packed batch gives what each of its sequences gives alone."""
    lengths = [5, 40, 0, 23]
    packed = make_inputs(lengths, dtype=torch.float64)
    whole = reference.nsa_attention(
        *packed.tensors, config=packed.config, cu_seqlens=packed.cu_seqlens
    )
    tokens = offsets(lengths).tolist()
    first_block = 0
    for start, stop in itertools.pairwise(tokens):
        blocks = max(0, (stop - start - 8) // 4 + 1)
        compressed = slice(first_block, first_block + blocks)
        rows = slice(start, stop)
        alone = reference.nsa_attention(
            packed.q[rows],
            packed.k_cmp[compressed],
            packed.v_cmp[compressed],
            packed.k_slc[rows],
            packed.v_slc[rows],
            packed.k_win[rows],
            packed.v_win[rows],
            packed.gates[rows],
            config=packed.config,
        )
        assert torch.allclose(whole[rows], alone)
        first_block += blocks
