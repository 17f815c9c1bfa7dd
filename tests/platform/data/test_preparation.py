"""Preparation without Ray: complete, the same however it is run, and safe to be interrupted."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsa_platform import storage
from nsa_platform.config.data import CorpusConfig, TokenizerConfig
from nsa_platform.config.runs import PrepareDataRun
from nsa_platform.data import corpus as corpus_module
from nsa_platform.data import preparation as preparation_module
from nsa_platform.data.corpus import CorpusError
from nsa_platform.data.each import in_turn
from nsa_platform.data.manifest import ManifestError, read_manifest
from nsa_platform.data.merging import plan_shards
from nsa_platform.data.plan import Plan, Prepared, Progress
from nsa_platform.data.preparation import prepare
from nsa_platform.data.shards import ShardSet
from nsa_platform.data.tokenizer import Tokenizer, TokenizerError


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a small corpus fall into many parts."""
    monkeypatch.setattr(corpus_module, "SMALLEST_PART_BYTES", 3_000)


def corpus_files(folder: Path, count: int = 30) -> list[str]:
    """Text files of different lengths; returns the texts in the order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [
        f"Document {number}: " + f"word{number} " * (20 + 13 * number) for number in range(count)
    ]
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_text(text)
    return texts


def text_run(folder: Path, given: Any = None, **options: Any) -> PrepareDataRun:
    source = {"path": str(given.tokenizer)} if given else {"train_vocab_size": 300}
    tree: dict[str, Any] = {
        "name": "t",
        "corpus": {"inputs": [str(folder / "raw")]},
        "tokenizer": source,
        "output": str(folder / "out"),
        "shard_tokens": 2_000,
        "validation_fraction": 0.2,
    }
    return PrepareDataRun.parse(tree | options)


def run_here(run: PrepareDataRun, each: Any = in_turn) -> Prepared:
    return prepare(Plan(run, run.output + "-cache"), each=each)


def output_files(folder: Path) -> dict[str, bytes]:
    return {
        entry.name: Path(entry.uri).read_bytes()
        for entry in storage.walk(str(folder / "out"))
        if entry.name != "prepared.json"
    }


def documents(folder: Path, split: str) -> list[list[int]]:
    shards = ShardSet(str(folder / "out" / split))
    opened = [shards.open(number) for number in range(len(shards))]
    return [
        shard.ids[begin:end].tolist()
        for shard in opened
        for begin, end in zip(shard.offsets[:-1], shard.offsets[1:], strict=True)
    ]


@pytest.mark.usefixtures("many_parts")
def test_every_document_is_there_once_in_order(tmp_path: Path) -> None:
    texts = corpus_files(tmp_path / "raw")
    done = run_here(text_run(tmp_path))
    tokenizer = Tokenizer(tmp_path / "out" / "tokenizer")
    found = {split: documents(tmp_path, split) for split in ("train", "validation")}
    assert all(ids[-1] == tokenizer.eos_id for rows in found.values() for ids in rows)
    decoded = {split: [tokenizer.decode(ids) for ids in rows] for split, rows in found.items()}
    assert sorted(decoded["train"] + decoded["validation"]) == sorted(texts)
    assert [texts.index(text) for text in decoded["train"]] == sorted(
        map(texts.index, decoded["train"])
    )
    assert 0 < len(decoded["validation"]) < 15
    assert done.documents == {split: len(rows) for split, rows in decoded.items()}
    assert done.tokens == {split: sum(map(len, rows)) for split, rows in found.items()}
    assert done.text_bytes == {split: sum(map(len, rows)) for split, rows in decoded.items()}
    assert done.parts > 5 and done.reused_parts == 0
    assert done.shards["train"] == len(ShardSet(str(tmp_path / "out" / "train"))) > 2
    manifest = read_manifest(str(tmp_path / "out" / "train"))
    assert manifest.digest == done.digests["train"]
    assert manifest.tokenizer.fingerprint == tokenizer.fingerprint
    assert manifest.loss_tokens == manifest.tokens - manifest.rows
    assert not (tmp_path / "out" / "_staging").exists()


def backwards(function: Callable, jobs: Sequence) -> Iterator:
    return iter([function(job) for job in reversed(jobs)])


@pytest.mark.usefixtures("many_parts")
def test_the_result_does_not_depend_on_who_runs_it(tmp_path: Path) -> None:
    for name, each in (("a", in_turn), ("b", backwards)):
        corpus_files(tmp_path / name / "raw")
        run_here(text_run(tmp_path / name), each)
    assert output_files(tmp_path / "a") == output_files(tmp_path / "b")


class Killed(BaseException):
    """Stands for a kill: nothing in the code catches it."""


def killed_after(count: int) -> Callable[[Callable, Sequence], Iterator]:
    def each(function: Callable, jobs: Sequence) -> Iterator:
        for number, job in enumerate(jobs):
            if number == count:
                raise Killed
            yield function(job)

    return each


@pytest.mark.usefixtures("many_parts")
def test_a_killed_preparation_goes_on(tmp_path: Path) -> None:
    corpus_files(tmp_path / "raw")
    straight = run_here(text_run(tmp_path))
    expected = output_files(tmp_path)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(Killed):
        run_here(text_run(tmp_path), killed_after(3))
    for split in ("train", "validation"):
        with pytest.raises(ManifestError):
            ShardSet(str(tmp_path / "out" / split))
    again = run_here(text_run(tmp_path))
    assert again.reused_parts == 3
    assert again.digests == straight.digests
    assert output_files(tmp_path) == expected


@pytest.mark.usefixtures("many_parts")
def test_a_changed_file_is_read_again(tmp_path: Path, tiny_shards: Any) -> None:
    corpus_files(tmp_path / "raw")
    run = text_run(tmp_path, tiny_shards)
    with pytest.raises(Killed):
        run_here(run, killed_after(4))
    changed = tmp_path / "raw" / "001.txt"
    text = changed.read_text().replace("word1", "WORD1")
    changed.write_text(text)
    done = run_here(run)
    assert done.reused_parts == 3
    tokenizer = Tokenizer(tmp_path / "out" / "tokenizer")
    rows = [*documents(tmp_path, "train"), *documents(tmp_path, "validation")]
    assert text in [tokenizer.decode(ids) for ids in rows]


@pytest.mark.usefixtures("many_parts")
def test_changed_settings_reuse_nothing_stale(tmp_path: Path, tiny_shards: Any) -> None:
    corpus_files(tmp_path / "raw")
    with pytest.raises(Killed):
        run_here(text_run(tmp_path, tiny_shards), killed_after(4))
    done = run_here(text_run(tmp_path, tiny_shards, validation_fraction=0.5))
    assert done.reused_parts == 0


def test_nothing_is_done_twice(tmp_path: Path) -> None:
    corpus_files(tmp_path / "raw")
    first = run_here(text_run(tmp_path))

    def nobody(function: Callable, jobs: Sequence) -> Iterator:
        raise AssertionError(f"{len(jobs)} jobs were started")

    again = run_here(text_run(tmp_path), nobody)
    assert again.reused_parts == again.parts
    assert again.digests == first.digests


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: (out / "train" / "shard-00000.arrow").unlink(),
        lambda out: os.truncate(out / "validation" / "shard-00000.arrow", 10),
        lambda out: (out / "train" / "manifest.json").unlink(),
        lambda out: (out / "prepared.json").unlink(),
        lambda out: shutil.rmtree(out / "tokenizer"),
    ],
)
def test_a_damaged_result_is_made_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    corpus_files(tmp_path / "raw", 8)
    run = text_run(tmp_path, validation_fraction=0.5)
    run_here(run)
    expected = output_files(tmp_path)
    damage(tmp_path / "out")
    (tmp_path / "out" / "prepared.json").touch()
    assert run_here(run).reused_parts == 0
    assert output_files(tmp_path) == expected


def test_a_changed_run_replaces_the_whole_result(tmp_path: Path) -> None:
    corpus_files(tmp_path / "raw")
    first = run_here(text_run(tmp_path))
    second = run_here(text_run(tmp_path, shard_tokens=100_000))
    assert second.digests != first.digests
    names = [name for name in output_files(tmp_path) if name.startswith("train")]
    assert sorted(names) == ["train/manifest.json", "train/shard-00000.arrow"]


@pytest.mark.parametrize("step", ["write_manifest", "_merge", "_summary"])
def test_a_kill_while_writing_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    corpus_files(tmp_path / "raw")
    run_here(text_run(tmp_path))
    run = text_run(tmp_path, shard_tokens=5_000)

    def kill(*arguments: object, **options: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(preparation_module, step, kill)
        with pytest.raises(Killed):
            run_here(run)
    assert Plan(run, str(tmp_path)).finished() is None
    assert Plan(text_run(tmp_path), str(tmp_path)).finished() is None
    if step != "_summary":
        with pytest.raises(ManifestError):
            ShardSet(str(tmp_path / "out" / "train"))
    assert run_here(run).reused_parts == run_here(run).parts


def test_equal_documents_share_a_split(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    rows = [{"text": f"text {number % 40}"} for number in range(400)]
    (tmp_path / "raw" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = run_here(text_run(tmp_path, validation_fraction=0.3))
    train, validation = (documents(tmp_path, split) for split in ("train", "validation"))
    assert not {tuple(ids) for ids in train} & {tuple(ids) for ids in validation}
    assert all(count % 10 == 0 for count in done.documents.values())
    assert done.documents["validation"] > 0


def test_skipped_documents_are_reported(tmp_path: Path) -> None:
    corpus_files(tmp_path / "raw", 5)
    (tmp_path / "raw" / "empty.txt").write_text(" \n")
    (tmp_path / "raw" / "latin.txt").write_bytes(b"gr\xfc\xdf dich " * 20)
    (tmp_path / "raw" / "rows.jsonl").write_text('{"text": "x"}\n{"text"\n{"other": 1}\n')
    done = run_here(text_run(tmp_path))
    assert done.skipped == {"empty": 1, "missing_field": 1, "unreadable_row": 1}
    rows = tmp_path / "raw" / "rows.jsonl"
    assert done.skipped_first == {
        "empty": str(tmp_path / "raw" / "empty.txt"),
        "missing_field": f"{rows} at byte 22",
        "unreadable_row": f"{rows} at byte 14",
    }
    assert done.replaced_utf8 == 1
    assert sum(done.documents.values()) == 7
    assert dict(read_manifest(str(tmp_path / "out" / "train")).source.skipped) == done.skipped


def test_an_empty_corpus_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.txt").write_text("")
    with pytest.raises(CorpusError, match=r"no document is left .* 1 files.*'empty': 1"):
        run_here(text_run(tmp_path))
    assert storage.list_names(str(tmp_path / "out")) == []


def test_a_missing_field_leaves_no_result(tmp_path: Path) -> None:
    corpus_files(tmp_path / "raw", 3)
    (tmp_path / "raw" / "rows.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(CorpusError, match=r"rows\.jsonl: no row has the field 'text', but body"):
        run_here(text_run(tmp_path))
    assert storage.list_names(str(tmp_path / "out")) in ([], ["_staging"])


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    corpus_files(tmp_path / "raw", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(CorpusError, match=r"output: .*out holds thesis\.txt"):
        run_here(text_run(tmp_path))
    with pytest.raises(CorpusError, match="lies in the input"):
        run_here(text_run(tmp_path, output=str(tmp_path / "raw" / "out")))
    with pytest.raises(CorpusError, match=r"thesis\.txt is a file"):
        run_here(text_run(tmp_path, output=str(tmp_path / "out" / "thesis.txt")))
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_progress_is_told(tmp_path: Path) -> None:
    corpus_files(tmp_path / "raw")
    told: list[Progress] = []
    run = text_run(tmp_path)
    done = prepare(Plan(run, str(tmp_path / "cache")), report=told.append)
    stages = list(dict.fromkeys(progress.stage for progress in told))
    assert stages == ["reading for the tokenizer", "tokenising", "writing shards"]
    last = {progress.stage: progress for progress in told}
    assert all(progress.done == progress.total for progress in last.values())
    assert last["tokenising"].total == 30
    assert last["tokenising"].tokens == sum(done.tokens.values())


def chat_rows() -> list[dict[str, Any]]:
    good = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello you"}]
    rows: list[Any] = [[*good, {"role": "user", "content": f"{n}"}] for n in range(30)]
    rows += [good[:1], [{"role": "tool", "content": "x"}], "text", None]
    rows.append([{"role": "user", "content": "<|im_end|>"}, good[1]])
    return [{"messages": row} for row in rows]


def test_chats(tmp_path: Path, tiny_shards: Any) -> None:
    (tmp_path / "raw").mkdir()
    lines = "\n".join(map(json.dumps, chat_rows()))
    (tmp_path / "raw" / "a.jsonl").write_text(lines)
    corpus = {"inputs": [str(tmp_path / "raw")], "kind": "chat"}
    done = run_here(text_run(tmp_path, tiny_shards, corpus=corpus))
    assert done.skipped == {
        "control_token": 1,
        "empty": 1,
        "malformed_messages": 2,
        "no_assistant_turn": 1,
    }
    bad = json.dumps(chat_rows()[30])
    assert done.skipped_first["malformed_messages"].startswith(
        f"{tmp_path}/raw/a.jsonl at byte {lines.index(bad) + len(bad) + 1}: messages[0].role "
    )
    assert sum(done.documents.values()) == 30
    shards = ShardSet(str(tmp_path / "out" / "train"))
    tokenizer = Tokenizer(tmp_path / "out" / "tokenizer")
    assert tokenizer.fingerprint == Tokenizer(tiny_shards.tokenizer).fingerprint
    opened = [shards.open(number) for number in range(len(shards))]
    written = np.concatenate([shard.ids[shard.loss_mask] for shard in opened])
    text = tokenizer.decode(written.tolist(), skip_special_tokens=False)
    assert text == "hello you<|im_end|>" * done.documents["train"]
    assert shards.manifest.loss_tokens == len(written)


def test_a_tokenizer_that_cannot_mask_chats(tmp_path: Path, tiny_shards: Any) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl").write_text(json.dumps(chat_rows()[0]))
    folder = tmp_path / "tokenizer"
    Tokenizer(tiny_shards.tokenizer).save(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    run = text_run(
        tmp_path,
        corpus={"inputs": [str(tmp_path / "raw")], "kind": "chat"},
        tokenizer={"path": str(folder)},
    )
    with pytest.raises(TokenizerError, match=r"\{% generation %\}"):
        Plan(run, str(tmp_path))
    assert not (tmp_path / "out").exists()


def test_the_tokenizers_sample_is_bounded_and_leaves_out_what_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for number in range(6):
        (tmp_path / "raw" / f"{number}.txt").write_text(f"{number} " + "ab cd " * 100_000)
    run = PrepareDataRun(
        name="t",
        corpus=CorpusConfig(inputs=(str(tmp_path / "raw"),)),
        tokenizer=TokenizerConfig(train_vocab_size=300, train_sample_mb=1),
        output=str(tmp_path / "out"),
        validation_fraction=0.0,
    )
    plan = Plan(run, str(tmp_path))
    sample = list(plan._sample(lambda progress: None))
    assert len(sample) == 2
    assert sample == list(plan._sample(lambda progress: None))
    held_out = Plan(run.model_copy(update={"validation_fraction": 0.999999}), str(tmp_path))
    assert list(held_out._sample(lambda progress: None)) == []


@pytest.mark.parametrize("seed", range(5))
def test_plan_shards_fills_in_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(1, 60, rng.integers(0, 20)).astype(np.uint32) for _ in range(6)]
    shards = plan_shards(lengths, 100)
    order = [
        (piece.part, row)
        for shard in shards
        for piece in shard
        for row in range(piece.start, piece.stop)
    ]
    assert order == [(part, row) for part, rows in enumerate(lengths) for row in range(len(rows))]
    sizes = [sum(int(lengths[p.part][p.start : p.stop].sum()) for p in shard) for shard in shards]
    assert all(size <= 100 for size in sizes)
    firsts = [int(lengths[shard[0].part][shard[0].start]) for shard in shards]
    assert all(a + b > 100 for a, b in zip(sizes[:-1], firsts[1:], strict=True))


def test_plan_shards_gives_a_long_document_its_own() -> None:
    shards = plan_shards([np.array([5, 500, 5], dtype=np.uint32)], 10)
    assert [[(p.start, p.stop) for p in shard] for shard in shards] == [
        [(0, 1)],
        [(1, 2)],
        [(2, 3)],
    ]


@pytest.mark.cluster
@pytest.mark.usefixtures("many_parts")
def test_from_s3_to_s3(tmp_path: Path, s3_environment: Any) -> None:
    corpus_files(tmp_path / "raw")
    run_here(text_run(tmp_path))
    bucket = s3_environment.bucket("prepare")
    storage.upload_tree(tmp_path / "raw", f"{bucket}/raw")
    run = text_run(tmp_path, corpus={"inputs": [f"{bucket}/raw"]}, output=f"{bucket}/out")
    plan = Plan(run, str(tmp_path / "cache"))
    with pytest.raises(Killed):
        prepare(plan, each=killed_after(2))
    assert prepare(plan).reused_parts == 2
    expected = output_files(tmp_path)
    storage.download_tree(f"{bucket}/out", tmp_path / "copy" / "out")
    assert output_files(tmp_path / "copy") == expected
    assert prepare(plan).reused_parts == len(plan.parts)
