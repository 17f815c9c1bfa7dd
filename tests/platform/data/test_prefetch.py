"""Reading ahead changes nothing but the time at which rows are read."""

from pathlib import Path

import pytest

from nsa_platform.data.manifest import ManifestMismatch
from nsa_platform.data.prefetch import Prefetched
from tests.platform.data.test_loader import loader, random_lengths, same, write


def test_the_same_steps_and_states(tmp_path: Path) -> None:
    write(tmp_path, random_lengths(1))
    plain, ahead = loader(tmp_path), Prefetched(loader(tmp_path), 4)
    for _ in range(30):
        assert ahead.state() == plain.state()
        assert same(ahead.next_step(4), plain.next_step(4))
    resumed = Prefetched(loader(tmp_path, state=ahead.state()), 4)
    assert same(resumed.next_step(4), plain.next_step(4))
    for each in (ahead, resumed):
        each.close()


def test_what_the_loader_meets_is_raised_in_its_turn(tmp_path: Path) -> None:
    write(tmp_path, [40] * 30)
    for shard in (tmp_path / "train").glob("*.arrow"):
        content = shard.read_bytes()
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    ahead = Prefetched(loader(tmp_path), 64)
    for _ in range(2):
        with pytest.raises(ManifestMismatch, match="sha256"):
            ahead.next_step(64)
    ahead.close()


def test_it_stops_when_it_is_closed(tmp_path: Path) -> None:
    write(tmp_path, random_lengths(1))
    ahead = Prefetched(loader(tmp_path), 4)
    ahead.next_step(4)
    with pytest.raises(ValueError, match="rows_per_step=8 must be 4"):
        ahead.next_step(8)
    ahead.close()
    assert not ahead._thread.is_alive()
