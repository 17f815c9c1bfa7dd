"""Rows in which numbers are told and told again."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from jobs import needle_rows
from nsa_platform.config.runs import EvaluateRun, PrepareDataRun, PretrainRun
from nsa_platform.data.shards import ShardSet
from nsa_platform.data.tokenizer import Tokenizer

TOLD = re.compile(r"\nThe secret number of (\w+) is (\d{5})\.\n")
LENGTH, ROWS, KEYS = 400, 24, 6


def write(data: Path, output: Path | str, *more: str) -> None:
    sizes = {"length": LENGTH, "rows": ROWS, "keys": KEYS, "processes": 1}
    flags = [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
    needle_rows.main([str(data), str(output), *flags, *more])


@pytest.fixture(scope="module")
def rows(tiny_shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("needle_rows") / "rows"
    write(tiny_shards.path, output)
    return output


def texts_of(folder: Path, split: str) -> list[str]:
    tokenizer = Tokenizer(folder / "tokenizer")
    shards = ShardSet(str(folder / split), tokenizer_fingerprint=tokenizer.fingerprint)
    found = []
    for index in range(len(shards)):
        shard = shards.open(index)
        assert set((shard.offsets[1:] - shard.offsets[:-1]).tolist()) == {LENGTH}
        for row in shard.ids.reshape(-1, LENGTH).tolist():
            assert row[-1] == tokenizer.eos_id and tokenizer.eos_id not in row[:-1]
            found.append(tokenizer.decode(row))
    return found


def test_every_number_is_told_twice_and_half_of_them_at_the_end(rows: Path) -> None:
    texts = texts_of(rows, "train")
    assert len(set(texts)) == ROWS and len(texts_of(rows, "validation")) == 8
    keys = at_end = 0
    for text in texts:
        told = TOLD.findall(text)
        assert 2 <= len(told) <= 2 * KEYS
        assert sorted(told) == sorted(2 * [*set(told)])
        assert len({word for word, _ in told}) == len(told) // 2
        # What is told for the first time stands anywhere, so most of it before other text.
        tail = re.search(r"(?:\nThe secret number of \w+ is \d{5}\.\n)*\Z", text)
        assert tail is not None and tail.start() > LENGTH // 4
        keys += len(told) // 2
        at_end += tail.group().count("secret")
    assert 0.35 < at_end / keys < 0.75


def test_only_numbers_that_were_told_before_are_answers(
    rows: Path, tiny_shards, tmp_path: Path
) -> None:
    write(tiny_shards.path, tmp_path / "rows", "--answers-only")
    assert texts_of(tmp_path / "rows", "train") == texts_of(rows, "train")
    tokenizer = Tokenizer(tmp_path / "rows" / "tokenizer")
    shards = ShardSet(str(tmp_path / "rows" / "train"), tokenizer_fingerprint=tokenizer.fingerprint)
    assert shards.manifest.kind == "chat"
    shard = shards.open(0)
    assert shard.loss_mask is not None
    for ids, learned in zip(
        shard.ids.reshape(-1, LENGTH), shard.loss_mask.reshape(-1, LENGTH), strict=True
    ):
        edges = np.flatnonzero(np.diff(learned.astype(int), prepend=0, append=0))
        begins = edges[::2].tolist()
        answers = [
            tokenizer.decode(ids[begin:end].tolist())
            for begin, end in zip(begins, edges[1::2], strict=True)
        ]
        told = TOLD.findall(tokenizer.decode(ids.tolist()))
        assert len(answers) == len(told) // 2 > 0
        for begin, answer in zip(begins, answers, strict=True):
            # The question ends where the answer begins, and the same answer was read before.
            before = tokenizer.decode(ids[:begin].tolist())
            question = re.search(r"\nThe secret number of (\w+) is\Z", before)
            assert question is not None
            assert f"{question.group()}{answer}" in before
            assert re.fullmatch(r" \d{5}\.\n", answer)


def test_other_peoples_folders_are_left_alone(
    rows: Path, tiny_shards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_shards.path, other)
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    for output, told in (
        (other, f"{other}: holds other files (prepared.json, ...)"),
        (tiny_shards.path, "is the data itself"),
        ("s3://bucket/rows", "rows are made from and in local folders"),
    ):
        with pytest.raises(SystemExit):
            write(tiny_shards.path, output)
        assert told in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        write(rows, tmp_path / "of rows")
    assert "holds such rows already" in capsys.readouterr().err
    assert not (tmp_path / "of rows").exists()
    # Its own are written again.
    (tmp_path / "mine").mkdir()
    for _ in range(2):
        write(tiny_shards.path, tmp_path / "mine")
    assert texts_of(tmp_path / "mine", "train") == texts_of(rows, "train")


def test_rows_depend_on_the_seed_alone(rows: Path, tiny_shards, tmp_path: Path) -> None:
    write(tiny_shards.path, tmp_path / "same")
    write(tiny_shards.path, tmp_path / "other", "--seed", "1")
    assert texts_of(tmp_path / "same", "train") == texts_of(rows, "train")
    assert not set(texts_of(tmp_path / "other", "train")) & set(texts_of(rows, "train"))


def test_a_refused_number_of_keys_is_told_how_many_fit(
    tiny_shards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = needle_rows.words()
    write(tiny_shards.path, tmp_path / "full", "--keys", str(len(pool)))
    most = max(len(set(TOLD.findall(text))) for text in texts_of(tmp_path / "full", "train"))
    with pytest.raises(SystemExit):
        write(tiny_shards.path, tmp_path / "more", "--keys", str(len(pool) + 1))
    said = capsys.readouterr().err
    (room,) = re.findall(
        rf"the words that there are; --length={LENGTH} has room for about (\d+)", said
    )
    assert abs(int(room) - most) <= 1
    assert not (tmp_path / "more").exists()


def test_what_cannot_be_written_is_refused_before_anything_is(
    tiny_shards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag, value, told in (
        ("--length", "40", "--length=40 has no room for a sentence that is told twice"),
        ("--keys", "100000", "--keys=100000 must not exceed "),
        ("--rows", "0", "--rows must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            write(tiny_shards.path, tmp_path / "none", flag, value)
        assert told in capsys.readouterr().err
        assert not (tmp_path / "none").exists()


def test_the_recipe_prepares_the_text_that_its_model_reads() -> None:
    configs = Path(__file__).resolve().parents[2] / "jobs/configs"
    text = PrepareDataRun.load(configs / "prepare_data/needle_text.yaml")
    model = PretrainRun.load(configs / "pretrain/nsa_needle.yaml").model
    asked = EvaluateRun.load(configs / "evaluate/needle.yaml")
    assert model is not None and text.tokenizer.train_vocab_size == model.vocab_size
    assert text.output == asked.data and text.validation_fraction > 0
