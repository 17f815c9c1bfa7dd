"""Sizes: which fit together, and how many compressed blocks they make."""

import dataclasses

import pytest
import torch

from nsa_kernels import NsaConfig, compressed_cu_seqlens, num_compressed_blocks
from tests.kernels.cases import CONFIGS, PAPER, offsets


def test_defaults_are_the_papers() -> None:
    assert PAPER.sizes == [32, 16, 64, 16, 1, 2, 512]
    assert NsaConfig(*PAPER.sizes) == PAPER


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PAPER.window_size = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "field", "rule"),
    [
        ({"compression_stride": 12}, "compression_stride=12", "d | l, Eq. 9"),
        ({"selection_block_size": 40}, "selection_block_size=40", "d | l', Eq. 9"),
        ({"selection_block_size": 16}, "selection_block_size=16", "l <= l'"),
        ({"num_selected_blocks": 2}, "num_selected_blocks=2", "must fit into"),
        ({"num_initial_blocks": 15}, "num_local_blocks = 17", "must fit into"),
        ({"num_initial_blocks": -1}, "num_initial_blocks=-1", "at least 0"),
        ({"num_local_blocks": 0}, "num_local_blocks=0", "at least 1"),
        ({"window_size": 0}, "window_size=0", "at least 1"),
        ({"compression_block_size": 32.0}, "compression_block_size=32.0", "integer"),
        ({"window_size": True}, "window_size=True", "integer"),
    ],
)
def test_bad_sizes_are_named(changes: dict[str, int], field: str, rule: str) -> None:
    with pytest.raises(ValueError) as error:
        dataclasses.replace(PAPER, **changes)
    assert field in str(error.value) and rule in str(error.value)


@pytest.mark.parametrize(
    ("tokens", "blocks"), [(0, 0), (1, 0), (31, 0), (32, 1), (47, 1), (48, 2), (64, 3), (8192, 511)]
)
def test_complete_blocks_of_the_paper(tokens: int, blocks: int) -> None:
    assert num_compressed_blocks(tokens, PAPER) == blocks


@pytest.mark.parametrize("name", CONFIGS)
def test_complete_blocks_by_counting(name: str) -> None:
    config = CONFIGS[name]
    l, d = config.compression_block_size, config.compression_stride
    for tokens in range(4 * l):
        counted = sum(start + l <= tokens for start in range(0, tokens + 1, d))
        assert num_compressed_blocks(tokens, config) == counted
        assert counted <= tokens // d


@pytest.mark.parametrize("lengths", [[333], [0], [5, 61, 0, 1, 33, 7], [31, 32, 33]])
def test_packed_offsets(lengths: list[int]) -> None:
    got = compressed_cu_seqlens(offsets(lengths), PAPER)
    counts = [num_compressed_blocks(length, PAPER) for length in lengths]
    assert got.dtype == torch.int32
    assert got.tolist() == offsets(counts).tolist()
