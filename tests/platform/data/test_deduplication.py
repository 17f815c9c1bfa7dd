"""Copies are left out of what is prepared: the first of each set stays, nothing else goes."""

import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_platform import storage
from nsa_platform.config.base import ConfigError
from nsa_platform.config.data import DeduplicateConfig
from nsa_platform.config.runs import PrepareDataRun
from nsa_platform.data import corpus as corpus_module
from nsa_platform.data import deduplication as deduplication_module
from nsa_platform.data.each import in_turn
from nsa_platform.data.fingerprints import buckets, equal, joined, text_hash
from nsa_platform.data.inspection import copies, inspect, leaked
from nsa_platform.data.plan import Plan, Prepared
from nsa_platform.data.preparation import prepare
from nsa_platform.data.shards import ShardSet
from nsa_platform.data.tokenizer import Tokenizer

SPLITS = ("train", "validation")
RNG = np.random.default_rng(1)


@pytest.fixture(autouse=True)
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a small corpus fall into many parts, and its documents into many shares."""
    monkeypatch.setattr(corpus_module, "SMALLEST_PART_BYTES", 8_000)
    monkeypatch.setattr(deduplication_module, "SHARE", 10)


def prose(words: int = 300) -> str:
    return " ".join(f"{word:03d}" for word in RNG.integers(0, 1000, words))


def with_a_word_changed(text: str) -> str:
    words = text.split(" ")
    words[len(words) // 2] = "changed"
    return " ".join(words)


def respelled(text: str) -> str:
    """The same but for white space, and digits of full width."""
    wide = text.replace("1", "\N{FULLWIDTH DIGIT ONE}")
    assert unicodedata.normalize("NFKC", wide) == text
    return "\n" + wide.replace(" ", "\n\t", 3) + "  "


def write_rows(file: Path, texts: Sequence[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def run_of(folder: Path, tokenizer: Path, **options: Any) -> PrepareDataRun:
    tree: dict[str, Any] = {
        "name": "t",
        "corpus": {"inputs": [str(folder / "one"), str(folder / "two")]},
        "tokenizer": {"path": str(tokenizer)},
        "output": str(folder / "out"),
        "shard_tokens": 5_000,
        "validation_fraction": 0.3,
    }
    return PrepareDataRun.parse(tree | options)


def prepared(run: PrepareDataRun, each: Any = in_turn) -> Prepared:
    return prepare(Plan(run, run.output + "-cache"), each=each)


def texts_of(run: PrepareDataRun) -> list[str]:
    tokenizer = Tokenizer(Path(run.output) / "tokenizer")
    found: list[str] = []
    for split in SPLITS:
        shards = ShardSet(f"{run.output}/{split}")
        assert shards.manifest.loss_tokens == shards.manifest.tokens - shards.manifest.rows
        texts = [
            tokenizer.decode(shard.ids[begin:end].tolist())
            for shard in map(shards.open, range(len(shards)))
            for begin, end in zip(shard.offsets[:-1], shard.offsets[1:], strict=True)
        ]
        assert shards.manifest.text_bytes == sum(len(text.encode()) for text in texts)
        found += texts
    return found


@pytest.fixture
def corpus(tmp_path: Path) -> dict[str, list[str]]:
    """Two inputs with copies in and across them: what must stay for exact and for near."""
    own = [prose() for _ in range(24)]
    one = [*own[:12], own[3], own[12], own[12]]
    two = [respelled(own[5]), own[13], with_a_word_changed(own[0]), own[13], *own[14:]]
    two += [with_a_word_changed(two[-1]), prose(2)]
    write_rows(tmp_path / "one" / "a.jsonl", one)
    write_rows(tmp_path / "two" / "a.jsonl", two[:9])
    write_rows(tmp_path / "two" / "b.jsonl", two[9:])
    exact = [*own[:13], own[13], two[2], *two[4:]]
    return {"all": one + two, "exact": exact, "near": [*own, two[-1]]}


def test_the_first_of_each_set_of_copies_stays(
    tmp_path: Path, tiny_shards: Any, corpus: dict[str, list[str]]
) -> None:
    run = run_of(tmp_path, tiny_shards.tokenizer)
    prepared(run)
    assert sorted(texts_of(run)) == sorted(corpus["all"])

    run = run_of(tmp_path, tiny_shards.tokenizer, deduplicate={})
    done = prepared(run)
    assert done.parts > 3
    assert sorted(texts_of(run)) == sorted(corpus["exact"])
    assert done.skipped == {"copy": 4}
    assert ShardSet(f"{run.output}/train").manifest.source.skipped == done.skipped

    run = run_of(tmp_path, tiny_shards.tokenizer, deduplicate={"near_similarity": 0.8})
    done = prepared(run)
    assert sorted(texts_of(run)) == sorted(corpus["near"])
    assert done.skipped == {"copy": 4, "near_copy": 2}
    one, two = (done.sources[str(tmp_path / name)] for name in ("one", "two"))
    assert (one["documents"], one["copies"], one["near_copies"]) == (15, 2, 0)
    assert (two["documents"], two["copies"], two["near_copies"]) == (16, 2, 2)
    assert one["tokens_left"] + two["tokens_left"] == sum(done.tokens.values())
    assert one["tokens"] > one["tokens_left"] > 0

    train, held_out = (inspect(ShardSet(f"{run.output}/{s}"), None, each=in_turn) for s in SPLITS)
    found = [copies(train), copies(held_out), leaked(train, held_out)]
    assert all(part["documents"] == 0 for each in found for part in each.values())


def test_who_does_it_in_how_many_tasks_and_after_which_kill_is_all_the_same(
    tmp_path: Path, tiny_shards: Any, corpus: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, tiny_shards.tokenizer, deduplicate={"near_similarity": 0.8})
    straight = prepared(run)
    inputs = {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}

    def backwards(function: Callable, jobs: Sequence) -> Iterator:
        return iter([function(job) for job in reversed(jobs)])

    monkeypatch.setattr(deduplication_module, "SHARE", 1000)
    again = run.model_copy(update={"output": str(tmp_path / "again")})
    assert prepared(again, backwards).digests == straight.digests

    class Killed(BaseException):
        pass

    def killed_at_the_pairs(function: Callable, jobs: Sequence) -> Iterator:
        if function is deduplication_module.find_pairs:
            raise Killed
        return map(function, jobs)

    killed = run.model_copy(update={"output": str(tmp_path / "killed")})
    with pytest.raises(Killed):
        prepared(killed, killed_at_the_pairs)
    assert storage.list_names(killed.output) == ["_staging"]
    strict = killed.model_copy(update={"deduplicate": DeduplicateConfig(near_similarity=1.0)})
    with pytest.raises(Killed):
        prepared(strict, killed_at_the_pairs)
    done = prepared(killed)
    assert (done.digests, done.reused_parts) == (straight.digests, straight.parts)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")} == inputs
    assert prepared(killed).sources == straight.sources


def test_chats_are_copies_by_roles_and_contents(tmp_path: Path, tiny_shards: Any) -> None:
    def chat(question: str, answer: str = "yes, of course") -> dict[str, Any]:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": turns}

    rows = [chat("may I?"), chat("may  I?\n"), chat("may I"), chat("may I?", "no"), chat("may I?")]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = {"inputs": [str(tmp_path / "one")], "kind": "chat"}
    options = {"corpus": corpus, "deduplicate": {}, "validation_fraction": 0}
    done = prepared(run_of(tmp_path, tiny_shards.tokenizer, **options))
    assert (done.documents["train"], done.skipped) == (3, {"copy": 2})
    shards = ShardSet(str(tmp_path / "out" / "train"))
    mask = shards.open(0).loss_mask
    assert mask is not None and shards.manifest.loss_tokens == mask.sum()


@pytest.mark.parametrize("value", [0.5, 1.1])
def test_a_similarity_that_is_not_found_reliably_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(ConfigError, match=r"deduplicate\.near_similarity"):
        run_of(tmp_path, tmp_path, deduplicate={"near_similarity": value})


WORDS = st.lists(st.sampled_from(["a", "b", "é", "ﬁ", "Ｘ"]), min_size=1, max_size=6)


@given(WORDS, WORDS)
def test_text_hashes_are_equal_for_equal_words_alone(one: list[str], other: list[str]) -> None:
    normal = [[unicodedata.normalize("NFKC", word) for word in words] for words in (one, other)]
    spelled = [" ".join(one), "\n\t".join(unicodedata.normalize("NFD", word) for word in other)]
    assert (text_hash([spelled[0]]) == text_hash([spelled[1]])) == (normal[0] == normal[1])


@given(st.lists(st.integers(0, 5), max_size=30))
def test_equal_keys_are_joined_to_their_first(values: list[int]) -> None:
    keys = np.array(values, np.uint64)
    firsts = [values.index(value) for value in values]
    assert joined(np.arange(len(keys)), equal(keys)).tolist() == firsts
    shared = [np.flatnonzero(keys == key).tolist() for key in np.unique(keys)]
    assert [each.tolist() for each in buckets(keys)] == [each for each in shared if len(each) > 1]
