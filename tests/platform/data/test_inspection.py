"""Copies are found and counted, near ones by how much they share, and nothing else is."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_platform.data.each import in_turn
from nsa_platform.data.fingerprints import PLACES, RUN, exact_hash, near_copies, signature
from nsa_platform.data.inspection import copies, inspect, leaked, statistics
from nsa_platform.data.manifest import ManifestMismatch, SourceRecord, TokenizerRecord
from nsa_platform.data.shards import ShardSet, ShardWriter

TOKENIZER = TokenizerRecord(fingerprint="0" * 64, vocab_size=1000, eos_id=0, pad_id=1)
RNG = np.random.default_rng(0)


def text(length: int) -> np.ndarray:
    return RNG.integers(2, 1000, length)


def edited(ids: np.ndarray, places: int) -> np.ndarray:
    """The same with single tokens changed, far from each other."""
    result = ids.copy()
    result[np.linspace(0, len(ids) - 1, places).astype(int)] = 1
    return result


def resemblance(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard similarity of the sets of runs, counted out."""
    sets = [{tuple(ids[i : i + RUN]) for i in range(len(ids) - RUN + 1)} for ids in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize("places", [2, 5, 20, 60])
def test_signatures_agree_as_much_as_documents_do(places: int) -> None:
    pairs = [(ids, edited(ids, places)) for ids in (text(500) for _ in range(40))]
    wanted = np.mean([resemblance(*pair) for pair in pairs])
    found = np.mean([(signature(a) == signature(b)).mean() for a, b in pairs])
    assert found == pytest.approx(wanted, abs=0.05)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=30))
def test_any_document_has_a_signature_and_a_hash(ids: list[int]) -> None:
    array = np.array(ids, np.uint32)
    assert signature(array).shape == (PLACES,)
    assert exact_hash(array) == exact_hash(array.astype(np.int64))
    assert exact_hash(array) != exact_hash(np.append(array, 0))


def test_near_copies_point_to_the_first_of_them() -> None:
    one, other = text(400), text(400)
    documents = [one, other, edited(one, 3), text(400), edited(other, 5), edited(one, 2), text(3)]
    found = near_copies(np.array([signature(ids) for ids in documents]))
    assert found.tolist() == [0, 1, 0, 3, 1, 0, 6]


def write(folder: Path, split: str, documents: list[np.ndarray]) -> ShardSet:
    writer = ShardWriter(
        str(folder / split), kind="text", split=split, tokenizer=TOKENIZER, shard_tokens=1000
    )
    for ids in documents:
        writer.add([int(each) for each in ids], text_bytes=len(ids))
    writer.finish(SourceRecord(files=1, bytes=1, documents=len(documents)))
    return ShardSet(str(folder / split))


def test_a_split_is_counted_and_compared(tmp_path: Path) -> None:
    first, second = text(300), text(500)
    shards = write(tmp_path, "train", [first, second, first, edited(second, 4), text(100)])
    assert len(shards) > 1
    train = inspect(shards, None, each=in_turn)
    counted = statistics(train)
    assert (counted["documents"], counted["tokens"], counted["longest"]) == (5, 1700, 500)
    assert counted["length_percentiles"]["50"] == 300
    assert counted["share_of_tokens_in_documents_of"] == {"8192": 0, "32768": 0, "65536": 0}
    assert 0 < counted["vocabulary_in_use"] < 1
    found = copies(train)
    assert (found["exact"]["documents"], found["exact"]["tokens"]) == (1, 300)
    assert (found["near"]["documents"], found["near"]["tokens"]) == (1, 500)
    assert found["near"]["share_of_tokens"] == pytest.approx(500 / 1700)

    held_out = write(tmp_path, "validation", [text(50), first, edited(second, 3)])
    found = leaked(train, inspect(held_out, None, each=in_turn))
    assert (found["exact"]["documents"], found["near"]["documents"]) == (1, 1)


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    shards = write(tmp_path, "train", [text(300)])
    (file,) = (tmp_path / "train").glob("*.arrow")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ManifestMismatch, match=r"shard-00000\.arrow"):
        inspect(shards, None, each=in_turn)
