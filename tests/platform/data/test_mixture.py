"""Mixtures: exact shares at any point, the same for any number of workers, resumed exactly."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_platform.config.data import LoaderConfig
from nsa_platform.data.loader import Loader, LoaderState
from nsa_platform.data.mixture import Mixture
from nsa_platform.data.shards import open_mixture, open_split
from tests.platform.data.test_loader import random_lengths, rows_of, same, write

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=2, max_size=5)


@given(WEIGHTS, st.integers(1, 300))
def test_each_source_has_its_share_to_within_a_row(weights: list[float], rows: int) -> None:
    mixture = Mixture(weights)
    for _ in range(rows):
        mixture.next()
    assert sum(mixture.dealt) == rows
    for weight, dealt in zip(weights, mixture.dealt, strict=True):
        assert abs(dealt - rows * weight / sum(weights)) < 1


@given(WEIGHTS, st.integers(0, 50))
def test_the_counts_are_all_its_state(weights: list[float], before: int) -> None:
    straight = Mixture(weights)
    for _ in range(before):
        straight.next()
    resumed = Mixture(weights, straight.dealt)
    assert [resumed.next() for _ in range(20)] == [straight.next() for _ in range(20)]


@pytest.fixture
def config(tmp_path: Path) -> LoaderConfig:
    """Three folders, of which the smallest is soon read again."""
    for name, seed, count in (("a", 1, 60), ("b", 2, 30), ("c", 3, 5)):
        write(tmp_path / name, random_lengths(seed, count))
    return LoaderConfig.parse(
        {
            "path": str(tmp_path / "a"),
            "context_length": 16,
            "weight": 5,
            "mixture": [
                {"path": str(tmp_path / "b"), "weight": 2},
                {"path": str(tmp_path / "c"), "weight": 1},
            ],
        }
    )


def mixed(config: LoaderConfig, **options: object) -> Loader:
    return Loader(open_split(config, "train"), config, more=open_mixture(config), **options)  # pyright: ignore


def test_rows_come_from_all_sources_and_small_ones_start_again(config: LoaderConfig) -> None:
    loader = mixed(config)
    for _ in range(10):
        loader.next_step(16)
    state = loader.state()
    assert state.dealt == (100, 40, 20)
    assert state.epoch == 1 and state.more[1].epoch >= 2
    # Each source gives its own rows in the order in which it would give them alone.
    alone = Loader(open_mixture(config)[0], config)
    rows = {tuple(row) for row in rows_of(alone.next_step(40), 16)}
    mixture = mixed(config)
    dealt = [tuple(row) for _ in range(10) for row in rows_of(mixture.next_step(16), 16)]
    assert rows <= set(dealt)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resumed_with_any_number_of_workers(config: LoaderConfig, world_size: int) -> None:
    straight = mixed(config)
    expected = [rows_of(straight.next_step(6), 16) for _ in range(8)]
    first = mixed(config, rank=1, world_size=2)
    for _ in range(4):
        first.next_step(6)
    state = LoaderState.from_dict(json.loads(json.dumps(first.state().to_dict())))
    workers = [mixed(config, rank=r, world_size=world_size, state=state) for r in range(world_size)]
    for step in expected[4:]:
        shares = [rows_of(worker.next_step(6), 16) for worker in workers]
        assert [shares[i % world_size][i // world_size] for i in range(6)] == step
    assert all(worker.state() == straight.state() for worker in workers)


def test_without_more_shards_it_is_the_plain_loader(config: LoaderConfig) -> None:
    plain = config.model_copy(update={"mixture": ()})
    one, other = (Loader(open_split(each, "train"), each) for each in (config, plain))
    assert same(one.next_step(8), other.next_step(8))
    assert one.state().to_dict() == {"epoch": 0, "row": 8}


def test_a_state_of_other_sources_is_refused(config: LoaderConfig) -> None:
    with pytest.raises(ValueError, match="loader state is of 1 sources, the data has 3"):
        mixed(config, state=LoaderState(row=3))
