"""select_blocks in Triton: the reference's choice, ties and forced blocks included."""

import pytest
import torch
from torch import Tensor

from nsa_kernels import (
    NsaConfig,
    compressed_attention,
    compressed_cu_seqlens,
    reference,
    select_blocks,
)
from nsa_kernels.triton_backend import importance as importance_module
from nsa_kernels.triton_backend import topn
from tests.kernels.cases import DENSE_STRIDE, EQUAL_BLOCKS, PAPER, SMALL, Inputs, make_inputs

# Importances closer than this, relative, may come out in either order in fp32.
CLOSE = 1e-5
ODD = NsaConfig(
    compression_block_size=12,
    compression_stride=6,
    selection_block_size=24,
    num_selected_blocks=5,
    num_initial_blocks=2,
    num_local_blocks=1,
    window_size=10,
)


def choose(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(Triton's choice, the reference's lse it was given)."""
    exact = inputs.double()
    _, lse = reference.compressed_attention(
        exact.q, exact.k_cmp, exact.v_cmp, config=inputs.config, cu_seqlens=exact.cu_seqlens
    )
    lse = lse.float().to(inputs.q.device)
    chosen = select_blocks(
        inputs.q,
        inputs.k_cmp,
        lse,
        config=inputs.config,
        cu_seqlens=inputs.cu_seqlens,
        backend="triton",
    )
    return chosen, lse


def assert_same_choice(chosen: Tensor, inputs: Inputs) -> None:
    """Equal to the reference in float64, but for blocks that are too close to tell apart."""
    exact, config = inputs.double(), inputs.config
    _, lse = reference.compressed_attention(
        exact.q, exact.k_cmp, exact.v_cmp, config=config, cu_seqlens=exact.cu_seqlens
    )
    wanted = reference.select_blocks(
        exact.q, exact.k_cmp, lse, config=config, cu_seqlens=exact.cu_seqlens
    )
    got = chosen.cpu()
    assert got.dtype == torch.int32
    assert got.shape == wanted.shape
    tokens = exact.cu_seqlens.tolist()
    blocks = compressed_cu_seqlens(exact.cu_seqlens, config).tolist()
    for b in range(len(tokens) - 1):
        rows, keys = slice(tokens[b], tokens[b + 1]), slice(blocks[b], blocks[b + 1])
        differs = (got[rows] != wanted[rows]).any(-1)
        if not differs.any():
            continue
        importance = reference.block_importance(
            exact.q[rows], exact.k_cmp[keys], lse[rows], config=config
        )
        for t, g in differs.nonzero().tolist():
            mine, right = got[rows][t, g].tolist(), wanted[rows][t, g].tolist()
            assert mine == sorted(mine), f"position {t}: {mine} is not ascending"
            disputed = sorted(set(mine) ^ set(right))
            assert disputed, f"position {t}: {mine} has repetitions"
            assert disputed[0] >= 0, f"position {t}: {mine} against {right}"
            values = importance[t, g, disputed]
            spread = (values.max() - values.min()) / values.max()
            assert spread < CLOSE, f"position {t}: {mine} against {right}, gap {spread:.2g}"


@pytest.mark.parametrize(
    ("config", "lengths", "groups", "heads_per_group", "key_width"),
    [
        (SMALL, [1, 7, 8, 9, 15, 17, 47, 120], 2, 2, 16),
        (SMALL, [0, 150, 0, 3], 1, 1, 32),
        (EQUAL_BLOCKS, [130, 40], 2, 3, 16),
        (DENSE_STRIDE, [110], 1, 16, 48),
        (ODD, [290], 1, 2, 16),
        (PAPER, [333], 1, 2, 192),
    ],
    ids=["boundaries", "empty", "equal", "dense", "odd", "paper"],
)
def test_equals_the_reference(
    config: NsaConfig, lengths: list[int], groups: int, heads_per_group: int, key_width: int
) -> None:
    inputs = make_inputs(
        lengths,
        config=config,
        groups=groups,
        heads_per_group=heads_per_group,
        key_width=key_width,
        spare_blocks=3,
    )
    chosen, _ = choose(inputs)
    assert_same_choice(chosen, inputs)


def test_half_precision_inputs_are_scored_in_float32() -> None:
    inputs = make_inputs([140], config=SMALL, dtype=torch.float16)
    assert_same_choice(choose(inputs)[0], inputs)


def tied_inputs(config: NsaConfig, length: int, device: str) -> Inputs:
    """Integer keys that repeat from one selection block to the next: importances tie exactly."""
    inputs = make_inputs([length], config=config, heads_per_group=3, device=device)
    strides = config.selection_block_size // config.compression_stride
    period = torch.randint(-1, 2, (strides, 2, 16), generator=torch.Generator().manual_seed(1))
    blocks = inputs.k_cmp.shape[0]
    repeated = period.repeat(-(-blocks // strides), 1, 1)[:blocks]
    inputs.k_cmp = repeated.to(inputs.k_cmp)
    inputs.q = (inputs.q * 2).round()
    return inputs


@pytest.mark.parametrize("config", [SMALL, EQUAL_BLOCKS, DENSE_STRIDE])
@pytest.mark.parametrize("is_zero", [False, True], ids=["repeated keys", "zero queries"])
def test_ties_go_to_the_lower_block(config: NsaConfig, is_zero: bool) -> None:
    inputs = tied_inputs(config, 150, "cpu")
    if is_zero:
        inputs.q = torch.zeros_like(inputs.q)
    chosen, lse = choose(inputs)
    arguments = (inputs.q, inputs.k_cmp, lse)
    wanted = reference.select_blocks(*arguments, config=config)
    assert torch.equal(chosen, wanted)
    assert torch.equal(chosen, select_blocks(*arguments, config=config, backend="torch"))


def test_chunks_of_queries_choose_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs([70, 5, 130], config=SMALL, groups=1)
    whole, _ = choose(inputs)
    monkeypatch.setattr(importance_module, "_BUFFER_BYTES", 1)
    assert torch.equal(choose(inputs)[0], whole)


def top_by_sorting(importance: Tensor, position: int, config: NsaConfig) -> list[int]:
    own = position // config.selection_block_size
    forced = {j for j in range(own + 1) if j < config.num_initial_blocks}
    forced |= {j for j in range(own + 1) if j > own - config.num_local_blocks}
    ranked = sorted(range(own + 1), key=lambda j: (j not in forced, -float(importance[j]), j))
    chosen = sorted(ranked[: config.num_selected_blocks])
    return chosen + [-1] * (config.num_selected_blocks - len(chosen))


@pytest.mark.parametrize("most_blocks", [16384, 32], ids=["one tile", "tile by tile"])
@pytest.mark.parametrize("config", [SMALL, EQUAL_BLOCKS, ODD])
def test_top_blocks_against_sorting(
    config: NsaConfig, most_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topn, "_MAX_TILE_BLOCKS", most_blocks)
    generator = torch.Generator().manual_seed(3)
    rows, groups, blocks = 40, 1, 70
    positions = torch.randint(
        -1, blocks * config.selection_block_size, (rows,), generator=generator, dtype=torch.int32
    )
    positions[:4] = torch.tensor([-1, 0, 2, blocks * config.selection_block_size - 1])
    importance = torch.randint(0, 5, (rows, groups, blocks), generator=generator).float() / 3
    importance[5] = 0.0
    own = positions[:, None, None] // config.selection_block_size
    poisoned = importance.masked_fill(torch.arange(blocks) > own, torch.nan)
    order = torch.randperm(rows, generator=generator, dtype=torch.int32)
    chosen = torch.full((rows, groups, config.num_selected_blocks), -7, dtype=torch.int32)
    topn.top_blocks(poisoned, positions, order, chosen, config)
    for row in range(rows):
        for group in range(groups):
            got = chosen[order[row], group].tolist()
            position = int(positions[row])
            if position < 0:
                assert got == [-7] * config.num_selected_blocks
            else:
                assert got == top_by_sorting(importance[row, group], position, config)


@pytest.mark.parametrize("most_blocks", [16384, 32], ids=["one tile", "tile by tile"])
def test_importances_that_are_not_numbers_stay_in_their_row(
    most_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of logits that overflow: NaN, whatever its bits, counts as infinite."""
    monkeypatch.setattr(topn, "_MAX_TILE_BLOCKS", most_blocks)
    blocks = 70
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001], dtype=torch.int32)
    importance = torch.zeros(3, 1, blocks)
    importance[1, 0] = bits.repeat(24)[:blocks].view(torch.float32)
    importance[2, 0, 40] = torch.nan
    positions = torch.full((3,), blocks * ODD.selection_block_size - 1, dtype=torch.int32)
    chosen = torch.full((3, 1, ODD.num_selected_blocks), -7, dtype=torch.int32)
    topn.top_blocks(importance, positions, None, chosen, ODD)
    assert chosen[:, 0].tolist() == [[0, 1, 2, 3, 69], [0, 1, 2, 3, 69], [0, 1, 2, 40, 69]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads_per_group", "key_width"), [(16, 128), (4, 192), (1, 64), (5, 256)])
def test_compiled_equals_the_reference(
    dtype: torch.dtype, heads_per_group: int, key_width: int, device: str
) -> None:
    inputs = make_inputs(
        [1, 31, 1400, 333],
        config=NsaConfig(num_selected_blocks=6),
        heads_per_group=heads_per_group,
        key_width=key_width,
        dtype=dtype,
        device=device,
        spare_blocks=5,
    )
    assert_same_choice(choose(inputs)[0], inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [SMALL, DENSE_STRIDE, PAPER])
def test_compiled_ties_go_to_the_lower_block(config: NsaConfig, device: str) -> None:
    inputs = tied_inputs(config, 1500, device)
    chosen, lse = choose(inputs)
    wanted = reference.select_blocks(inputs.q.cpu(), inputs.k_cmp.cpu(), lse.cpu(), config=config)
    assert torch.equal(chosen.cpu(), wanted)


@pytest.mark.gpu
def test_long_input_is_deterministic_and_agrees_with_torch(device: str) -> None:
    inputs = make_inputs([40000, 25536], config=PAPER, heads_per_group=4, key_width=64,
                         dtype=torch.bfloat16, device=device)  # fmt: skip
    keywords = {"config": PAPER, "cu_seqlens": inputs.cu_seqlens}
    _, lse = compressed_attention(
        inputs.q, inputs.k_cmp, inputs.v_cmp, backend="triton", **keywords
    )
    first = select_blocks(inputs.q, inputs.k_cmp, lse, backend="triton", **keywords)
    again = select_blocks(inputs.q, inputs.k_cmp, lse, backend="triton", **keywords)
    assert torch.equal(first, again)
    by_torch = select_blocks(inputs.q, inputs.k_cmp, lse, backend="torch", **keywords)
    # Random importances of a thousand blocks lie close together; a rare pair swaps in rounding.
    assert (first == by_torch).all(-1).float().mean() > 0.999
