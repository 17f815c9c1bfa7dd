"""The loader against a plain reading of the stream, over worker counts, resumes and odd sizes."""

import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_platform.config.data import LoaderConfig
from nsa_platform.data import packing
from nsa_platform.data.loader import Batch, Loader, LoaderState
from nsa_platform.data.manifest import Manifest, SourceRecord, TokenizerRecord
from nsa_platform.data.packing import IGNORED, best_fit, permutation
from nsa_platform.data.shards import ShardSet, ShardWriter, open_split

TOKENIZER = TokenizerRecord(fingerprint="f" * 64, vocab_size=1 << 30, eos_id=0, pad_id=3)


def write(
    folder: Path, lengths: list[int], *, shard_tokens: int = 100, chat: bool = False
) -> Manifest:
    """Documents of the given lengths; token values are unique: 1000, 1001, ..."""
    writer = ShardWriter(
        str(folder / "train"),
        kind="chat" if chat else "text",
        split="train",
        tokenizer=TOKENIZER,
        shard_tokens=shard_tokens,
    )
    value = 1000
    for length in lengths:
        ids = list(range(value, value + length))
        mask = [token % 3 == 0 for token in ids] if chat else None
        writer.add(ids, text_bytes=length, loss_mask=mask)
        value += length
    return writer.finish(SourceRecord(files=1, bytes=1, documents=len(lengths)))


def loader(
    folder: Path,
    *,
    length: int = 16,
    packing: str = "split",
    shuffle_rows: int = 1,
    **options: object,
) -> Loader:
    config = LoaderConfig(
        path=str(folder),
        context_length=length,
        packing=packing,  # pyright: ignore[reportArgumentType]
        seed=5,
        shuffle_rows=shuffle_rows,
    )
    return Loader(open_split(config, "train"), config, **options)  # pyright: ignore


def rows_of(batches: list[Batch], length: int) -> list[list[int]]:
    return [row.tolist() for batch in batches for row in batch.ids.view(-1, length)]


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(left, right, strict=True)
        for name in ("ids", "targets", "positions", "cu_seqlens")
    )


def random_lengths(seed: int, count: int = 60, high: int = 40) -> list[int]:
    return np.random.default_rng(seed).integers(1, high, count).tolist()


def check_pieces(batch: Batch, documents: dict[int, int], length: int) -> None:
    """Positions, boundaries and targets of a batch against the documents' own token values."""
    ids, targets = batch.ids.tolist(), batch.targets.tolist()
    bounds = batch.cu_seqlens.tolist()
    assert bounds[0] == 0 and bounds[-1] == len(ids) and bounds == sorted(set(bounds))
    assert set(range(0, len(ids), length)) <= set(bounds)
    for begin, end in pairwise(bounds):
        assert batch.positions[begin:end].tolist() == list(range(end - begin))
        piece = ids[begin:end]
        if piece[0] == TOKENIZER.pad_id:
            assert set(piece) == {TOKENIZER.pad_id}
            assert set(targets[begin:end]) == {IGNORED}
            continue
        last = documents[piece[0]]
        assert {documents[token] for token in piece} == {last}
        assert piece == list(range(piece[0], piece[0] + len(piece)))
        assert targets[begin : end - 1] == piece[1:]
        assert targets[end - 1] == (IGNORED if piece[-1] == last else piece[-1] + 1)


def last_tokens(lengths: list[int]) -> dict[int, int]:
    """For each token value, the last token of its document."""
    ends = np.cumsum(lengths) + 999
    return {
        value: int(end)
        for end, length in zip(ends, lengths, strict=True)
        for value in range(end - length + 1, end + 1)
    }


@pytest.mark.parametrize("length", [1, 2, 7, 16, 61, 500, 5000])
@pytest.mark.parametrize("seed", [0, 1])
def test_split_gives_each_token_once_in_right_pieces(
    tmp_path: Path, length: int, seed: int
) -> None:
    lengths = random_lengths(seed)
    manifest = write(tmp_path, lengths)
    assert len(manifest.shards) > 5
    stream = loader(tmp_path, length=length)
    seen: list[int] = []
    targets = 0
    while stream.state().epoch == 0:
        (batch,) = stream.next_step(1)
        check_pieces(batch, last_tokens(lengths), length)
        seen += [token for token in batch.ids.tolist() if token != TOKENIZER.pad_id]
        targets += batch.num_targets
        assert batch.num_targets == int((batch.targets != IGNORED).sum())
    assert sorted(seen) == list(range(1000, 1000 + sum(lengths)))
    assert targets == sum(lengths) - len(lengths) == manifest.loss_tokens
    assert seen != sorted(seen)


def test_split_pads_only_the_last_row_of_an_epoch(tmp_path: Path) -> None:
    write(tmp_path, [10, 13])
    stream = loader(tmp_path, length=10)
    assert stream.rows_per_epoch == 3
    assert stream.packer.padding_tokens == 7
    rows = rows_of([batch for _ in range(3) for batch in stream.next_step(1)], 10)
    assert [row.count(TOKENIZER.pad_id) for row in rows] == [0, 0, 7]


def test_the_target_at_a_cut_is_the_next_token_also_across_shards(tmp_path: Path) -> None:
    write(tmp_path, [64], shard_tokens=10)
    first, second = (loader(tmp_path, length=32).next_step(2)[i] for i in range(2))
    assert first.targets[-1] == second.ids[0] == 1032
    assert second.positions[0] == 0
    assert second.targets[-1] == IGNORED


def test_a_document_longer_than_many_rows_goes_on(tmp_path: Path) -> None:
    write(tmp_path, [1000])
    rows = rows_of(loader(tmp_path, length=16).next_step(62), 16)
    assert [row[0] for row in rows] == list(range(1000, 1992, 16))


def test_one_short_document_makes_one_padded_row(tmp_path: Path) -> None:
    write(tmp_path, [3])
    stream = loader(tmp_path, length=8)
    (batch,) = stream.next_step(1)
    assert batch.ids.tolist() == [1000, 1001, 1002, 3, 3, 3, 3, 3]
    assert batch.targets.tolist() == [1001, 1002] + [IGNORED] * 6
    assert batch.cu_seqlens.tolist() == [0, 3, 8]
    assert stream.state() == LoaderState(epoch=1, row=0)


@pytest.mark.parametrize("packing", ["split", "whole"])
def test_six_steps_are_three_and_three(tmp_path: Path, packing: str) -> None:
    write(tmp_path, random_lengths(2), chat=packing == "whole")
    straight = loader(tmp_path, packing=packing, length=64, rows_per_microbatch=2)
    expected = [straight.next_step(4) for _ in range(6)]
    assert straight.state().epoch >= 1, "the run must cross an epoch's end"
    first = loader(tmp_path, packing=packing, length=64, rows_per_microbatch=2)
    steps = [first.next_step(4) for _ in range(3)]
    state = LoaderState.from_dict(first.state().to_dict())
    second = loader(tmp_path, packing=packing, length=64, rows_per_microbatch=2, state=state)
    steps += [second.next_step(4) for _ in range(3)]
    assert all(same(a, b) for a, b in zip(expected, steps, strict=True))
    assert second.state() == straight.state()


@pytest.mark.parametrize("packing", ["split", "whole"])
@pytest.mark.parametrize(("world_size", "microbatch"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_any_number_of_workers_sees_the_same_step(
    tmp_path: Path, packing: str, world_size: int, microbatch: int
) -> None:
    write(tmp_path, random_lengths(3), chat=packing == "whole")
    alone = loader(tmp_path, packing=packing, length=64)
    workers = [
        loader(
            tmp_path,
            packing=packing,
            length=64,
            rank=rank,
            world_size=world_size,
            rows_per_microbatch=microbatch,
        )
        for rank in range(world_size)
    ]
    for _ in range(8):
        expected = rows_of(alone.next_step(4), 64)
        shares = [rows_of(worker.next_step(4), 64) for worker in workers]
        assert [shares[i % world_size][i // world_size] for i in range(4)] == expected
        assert all(worker.state() == alone.state() for worker in workers)


@pytest.mark.parametrize(("world_size", "microbatch"), [(3, 1), (3, 2), (5, 1), (4, 4), (9, 2)])
def test_rows_that_do_not_come_out_even_leave_blanks(
    tmp_path: Path, world_size: int, microbatch: int
) -> None:
    write(tmp_path, random_lengths(3))
    alone = loader(tmp_path)
    workers = [
        loader(tmp_path, rank=rank, world_size=world_size, rows_per_microbatch=microbatch)
        for rank in range(world_size)
    ]
    for _ in range(4):
        expected = rows_of(alone.next_step(8), 16)
        steps = [worker.next_step(8) for worker in workers]
        assert {len(batches) for batches in steps} == {-(-8 // (world_size * microbatch))}
        dealt = [[each for each in batches if not each.is_blank] for batches in steps]
        shares = [rows_of(batches, 16) for batches in dealt]
        assert [shares[i % world_size][i // world_size] for i in range(8)] == expected
        assert sum(len(share) for share in shares) == 8
        for batch in (each for batches in steps for each in batches if each.is_blank):
            assert batch.num_targets == 0 and not (batch.targets >= 0).any()
        assert all(worker.state() == alone.state() for worker in workers)


def test_a_run_goes_on_with_another_number_of_workers(tmp_path: Path) -> None:
    write(tmp_path, random_lengths(4))
    straight = loader(tmp_path, length=16)
    expected = [rows_of(straight.next_step(4), 16) for _ in range(4)]
    pair = [loader(tmp_path, length=16, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(2):
        for worker in pair:
            worker.next_step(4)
    alone = loader(tmp_path, length=16, rows_per_microbatch=4, state=pair[1].state())
    assert [rows_of(alone.next_step(4), 16) for _ in range(2)] == expected[2:]


def test_a_step_across_the_end_of_an_epoch(tmp_path: Path) -> None:
    write(tmp_path, [16] * 10)
    stream = loader(tmp_path, length=16)
    rows = [rows_of(stream.next_step(4), 16) for _ in range(5)]
    flat = [tuple(row) for step in rows for row in step]
    assert len(set(flat[:10])) == len(set(flat[10:])) == 10
    assert flat[:10] != flat[10:]
    assert stream.state() == LoaderState(epoch=2, row=0)


def test_order_depends_on_seed_and_epoch_only(tmp_path: Path) -> None:
    write(tmp_path, random_lengths(6))
    config = LoaderConfig(path=str(tmp_path), context_length=16, seed=6)
    other = Loader(open_split(config, "train"), config)
    first, again = loader(tmp_path), loader(tmp_path)
    assert rows_of(first.next_step(8), 16) == rows_of(again.next_step(8), 16)
    assert rows_of(other.next_step(8), 16) != rows_of(loader(tmp_path).next_step(8), 16)


def test_permutation_is_the_same_forever() -> None:
    assert permutation(8, 1, 2, 3).tolist() == [0, 7, 2, 3, 4, 1, 6, 5]
    assert sorted(permutation(1000, 0).tolist()) == list(range(1000))
    assert permutation(0, 1).tolist() == []


def test_whole_keeps_documents_together(tmp_path: Path) -> None:
    lengths = random_lengths(7)
    write(tmp_path, lengths)
    stream = loader(tmp_path, length=50, packing="whole")
    seen: list[int] = []
    while stream.state().epoch == 0:
        (batch,) = stream.next_step(1)
        check_pieces(batch, last_tokens(lengths), 50)
        seen += [token for token in batch.ids.tolist() if token != TOKENIZER.pad_id]
        firsts = batch.ids[batch.cu_seqlens[:-1].long()].tolist()
        assert set(firsts) <= {TOKENIZER.pad_id, *(np.cumsum([1000, *lengths]).tolist())}
    assert sorted(seen) == list(range(1000, 1000 + sum(lengths)))
    assert stream.packer.truncated_documents == 0


def test_whole_cuts_and_counts_documents_longer_than_a_row(tmp_path: Path) -> None:
    write(tmp_path, [30, 5, 20, 25], shard_tokens=1000)
    stream = loader(tmp_path, length=20, packing="whole")
    assert stream.packer.truncated_documents == 2
    assert stream.packer.truncated_tokens == 15
    rows = rows_of(stream.next_step(stream.rows_per_epoch), 20)
    assert sorted(row[0] for row in rows) == [1000, 1030, 1035, 1055]
    assert all(batch.targets[-1] == IGNORED for batch in stream.next_step(4))


def test_masked_tokens_are_no_targets(tmp_path: Path) -> None:
    manifest = write(tmp_path, [40, 7], chat=True)
    (batch,) = loader(tmp_path, length=64, packing="whole").next_step(1)
    counted = batch.targets[batch.targets != IGNORED].tolist()
    firsts = {1000, 1040}
    assert sorted(counted) == [v for v in range(1000, 1047) if v % 3 == 0 and v not in firsts]
    assert batch.num_targets == manifest.loss_tokens


def test_best_fit_takes_the_row_that_is_fullest_then() -> None:
    assert best_fit(np.array([6, 5, 4, 5, 10, 1]), 10).tolist() == [0, 1, 0, 1, 2, 3]
    # The 3 goes to the 7, not to the 6 that came before it; the 4 to the 6.
    assert best_fit(np.array([3, 6, 7, 4]), 10).tolist() == [0, 1, 0, 1]
    assert best_fit(np.zeros(0, dtype=np.int64), 10).tolist() == []


@given(st.lists(st.integers(0, 100), max_size=300), st.integers(1, 40), st.integers(1, 40))
def test_best_fit_keeps_its_promises(lengths: list[int], window: int, open_rows: int) -> None:
    items = np.array(lengths, dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW", window)
        patch.setattr(packing, "OPEN_ROWS", open_rows)
        rows = best_fit(items, 100)
    if not lengths:
        return
    filled = np.bincount(rows, weights=items)
    assert filled.max() <= 100
    firsts = list(dict.fromkeys(rows.tolist()))
    assert firsts == list(range(len(firsts)))
    # While all rows are open, no two of them are half empty.
    if open_rows >= len(firsts):
        assert (filled < 50).sum() <= 1


def test_packing_by_length_leaves_little_room() -> None:
    """Answers of some thousand tokens in rows of 8k; the oldest row with room leaves 2.4 %."""
    lengths = np.random.default_rng(0).lognormal(7.8, 0.7, 5000).astype(np.int64) + 1
    lengths = np.minimum(lengths, 8192)
    rows = best_fit(lengths, 8192)
    assert 1 - lengths.sum() / (8192 * (rows.max() + 1)) < 0.005


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"rows_per_microbatch": 0}, "rows_per_microbatch=0"),
        ({"state": LoaderState(epoch=0, row=10_000)}, "belongs to other data"),
    ],
)
def test_numbers_that_do_not_fit(tmp_path: Path, options: dict, message: str) -> None:
    write(tmp_path, [20])
    with pytest.raises(ValueError, match=message):
        loader(tmp_path, **options)


def test_an_empty_split_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, [])
    with pytest.raises(ValueError, match="holds no tokens"):
        loader(tmp_path)


@pytest.mark.parametrize("tree", [{}, {"epoch": 0}, {"epoch": 0, "row": -1}])
def test_a_state_that_is_none(tree: dict) -> None:
    with pytest.raises(ValueError, match="epoch and row"):
        LoaderState.from_dict(tree)


def test_only_touched_shards_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [16] * 100, shard_tokens=160)
    opened: list[int] = []
    plain = ShardSet.open

    def counting(shards: ShardSet, index: int):
        opened.append(index)
        return plain(shards, index)

    monkeypatch.setattr(ShardSet, "open", counting)
    stream = loader(tmp_path, length=16, state=LoaderState(epoch=3, row=55))
    stream.next_step(2)
    assert len(set(opened)) == 1


def test_the_loader_is_fast(tmp_path: Path) -> None:
    """The promise is two million tokens a second on one core; a tenth fails only when broken."""
    writer = ShardWriter(
        str(tmp_path / "train"), kind="text", split="train", tokenizer=TOKENIZER, shard_tokens=10**6
    )
    for _ in range(1000):
        writer.add(range(1000), text_bytes=1)
    writer.finish(SourceRecord(1, 1, 1000))
    stream = loader(tmp_path, length=1024, rows_per_microbatch=4)
    stream.next_step(4)
    started = time.perf_counter()
    for _ in range(100):
        stream.next_step(4)
    assert 100 * 4 * 1024 / (time.perf_counter() - started) > 200_000


@pytest.mark.parametrize("window", [1, 4, 7, 1000])
def test_rows_are_shuffled_within_windows_and_none_is_lost(tmp_path: Path, window: int) -> None:
    write(tmp_path, random_lengths(2))
    plain, shuffled = loader(tmp_path, length=8), loader(tmp_path, length=8, shuffle_rows=window)
    count = plain.rows_per_epoch
    for epoch in range(2):
        wanted = rows_of([plain.next_step(1)[0] for _ in range(count)], 8)
        found = rows_of([shuffled.next_step(1)[0] for _ in range(count)], 8)
        assert (found == wanted) == (window == 1)
        for begin in range(0, count, window):
            assert sorted(found[begin : begin + window]) == sorted(wanted[begin : begin + window])
        assert shuffled.state() == LoaderState(epoch + 1, 0)


def test_shuffled_rows_are_resumed_exactly_by_any_number_of_workers(tmp_path: Path) -> None:
    write(tmp_path, random_lengths(3))
    straight = loader(tmp_path, length=8, shuffle_rows=5)
    steps = [rows_of(straight.next_step(4), 8) for _ in range(6)]
    early = loader(tmp_path, length=8, shuffle_rows=5)
    for _ in range(3):
        early.next_step(4)
    workers = [
        loader(tmp_path, length=8, shuffle_rows=5, rank=r, world_size=2, state=early.state())
        for r in range(2)
    ]
    for step in steps[3:]:
        first, second = (rows_of(worker.next_step(4), 8) for worker in workers)
        assert [first[0], second[0], first[1], second[1]] == step
