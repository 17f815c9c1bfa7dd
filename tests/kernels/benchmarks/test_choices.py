"""Choices of blocks for the benchmarks are legal, and neighbours share as much as was asked for."""

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import overlap
from benchmarks.choices import Sharing, shared_blocks, uniform_blocks
from benchmarks.overlap import measure_overlap
from nsa_kernels import NsaConfig

SMALL = NsaConfig(8, 4, 16, 6, 1, 2, 24)
PAPER = NsaConfig()


def check_legal(blocks: Tensor, config: NsaConfig) -> None:
    """Ascending, none twice, none from the future, the forced ones in, as many as there can be."""
    n, size = config.num_selected_blocks, config.selection_block_size
    assert blocks.dtype == torch.int32
    for t in range(len(blocks)):
        own = t // size
        forced = {*range(min(own + 1, config.num_initial_blocks))}
        forced |= {*range(max(0, own + 1 - config.num_local_blocks), own + 1)}
        for chosen in blocks[t].tolist():
            picked = [j for j in chosen if j >= 0]
            assert chosen == picked + [-1] * (n - len(picked))
            assert picked == sorted(set(picked))
            assert len(picked) == min(n, own + 1)
            assert forced <= set(picked) <= set(range(own + 1))


SHARINGS = (
    Sharing(keep=0.0, home=0.0),
    Sharing(keep=0.6, home=0.5, nearness=2.0),
    Sharing(keep=1.0, home=1.0, home_life=1),
)


@pytest.mark.parametrize(
    "config", [SMALL, NsaConfig(8, 4, 16, 3, 1, 2, 24), NsaConfig(8, 4, 8, 5, 0, 1, 8)]
)
def test_choices_are_legal(config: NsaConfig) -> None:
    torch.manual_seed(0)
    for tokens in (1, 16, 97, 400):
        check_legal(uniform_blocks(tokens, 2, config, "cpu", rows_at_once=64), config)
        for sharing in SHARINGS:
            check_legal(shared_blocks(tokens, 2, config, sharing, "cpu"), config)


def test_overlap_is_near_what_was_asked_for() -> None:
    """Of the free blocks, keep stay; of the rest, a share home ** 2 was home and goes home."""
    torch.manual_seed(0)
    for keep, home in ((0.5, 0.0), (0.8, 0.0), (0.3, 0.7)):
        sharing = Sharing(keep, home, home_life=10**6)
        found = measure_overlap(shared_blocks(65536, 1, PAPER, sharing, "cpu"), PAPER)
        stays = keep + (1 - keep) * home**2
        # Strays come back by chance now and then, the more the fewer candidates there are.
        assert stays - 0.02 < found.kept < stays + 0.05
        free = PAPER.num_selected_blocks - 3
        assert abs(found.union[2] - 1 - free / 16 * (1 - found.kept)) < 0.03
    sizes = list(found.union.values())
    assert sizes == sorted(sizes)


def test_homes_make_unions_grow_slowly() -> None:
    """What leaves and comes back costs a union less than what never does, at as many kept."""
    torch.manual_seed(0)
    returning = shared_blocks(16384, 1, PAPER, Sharing(0.0, 0.8), "cpu")
    leaving = shared_blocks(16384, 1, PAPER, Sharing(0.64, 0.0), "cpu")
    a, b = measure_overlap(returning, PAPER), measure_overlap(leaving, PAPER)
    assert abs(a.kept - b.kept) < 0.06
    assert a.union[16] < 0.9 * b.union[16]


def test_nearness_draws_blocks_near() -> None:
    torch.manual_seed(0)
    even = shared_blocks(8192, 1, PAPER, Sharing(0.5, 0.5), "cpu")
    near = shared_blocks(8192, 1, PAPER, Sharing(0.5, 0.5, nearness=3.0), "cpu")
    a, b = measure_overlap(even, PAPER).distance, measure_overlap(near, PAPER).distance
    assert 0.4 < a[1] < 0.6 and b[1] < 0.3


def test_overlap_of_a_choice_counted_by_hand() -> None:
    config = NsaConfig(4, 4, 4, 3, 1, 1, 4)
    rows = [[0, t % 2 + 1, t // 4] for t in range(12, 12 + 16)]
    blocks = torch.tensor([[[-1, -1, -1]]] * 12 + [[row] for row in rows], dtype=torch.int32)
    found = measure_overlap(blocks, config)
    # Blocks 1 and 2 alternate: none is kept. Two tokens read 0, 1, 2 and their own block.
    assert found.kept == 0.0
    assert found.union == {2: 4 / 3, 4: 4 / 3, 8: 5 / 3, 16: 7 / 3}


def test_too_few_tokens_are_told() -> None:
    with pytest.raises(ValueError, match="1040 or more are needed"):
        measure_overlap(torch.zeros(1030, 1, 16, dtype=torch.int32), PAPER)


def test_overlap_reads_a_file(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path_factory.mktemp("blocks") / "blocks.npz"
    blocks = shared_blocks(2048, 2, PAPER, Sharing(0.5, 0.5), "cpu")
    np.savez_compressed(path, layer3=blocks.short().numpy())
    monkeypatch.setattr("sys.argv", ["overlap.py", str(path)])
    assert overlap.main() == 0
    assert capsys.readouterr().out.startswith("layer3: kept 0.")
