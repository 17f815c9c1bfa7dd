"""Which files belong to a corpus, and how they fall into parts."""

from pathlib import Path
from typing import Any

import pytest

from nsa_platform import storage
from nsa_platform.config.data import CorpusConfig
from nsa_platform.data.corpus import (
    SMALLEST_PART_BYTES,
    CorpusError,
    SourceFile,
    file_format,
    find_files,
    plan_parts,
)


def names(*inputs: Path | str, **options: Any) -> list[str]:
    corpus = CorpusConfig(inputs=tuple(map(str, inputs)), **options)
    return [file.name for file in find_files(corpus)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.txt", "a/x.py", "a/y.jsonl.gz", "a/z.bin", "c.md", "a/test/t.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_a_folder_is_walked_for_the_suffixes(folder: Path) -> None:
    everything = ["0/a/test/t.py", "0/a/x.py", "0/a/y.jsonl.gz", "0/b.txt", "0/c.md"]
    assert names(folder) == everything
    assert names(folder, suffixes=(".bin", ".md")) == ["0/a/z.bin", "0/c.md"]
    assert names(folder, exclude=("a/test/*", "*.md")) == everything[1:4]
    assert names(folder, kind="chat") == ["0/a/y.jsonl.gz"]


def test_inputs_keep_their_order_and_count_once(folder: Path) -> None:
    assert names(folder / "c.md", folder / "a", folder / "b.txt", folder / "a/x.py") == [
        "0/c.md",
        "1/test/t.py",
        "1/x.py",
        "1/y.jsonl.gz",
        "2/b.txt",
    ]


def test_more_than_ten_inputs_are_in_order(folder: Path) -> None:
    inputs = [folder / f"{number}.txt" for number in range(12)]
    for path in inputs:
        path.write_text("x")
    assert names(*inputs) == [f"{number}/{number}.txt" for number in range(12)]


def test_inputs_that_cannot_be(folder: Path) -> None:
    with pytest.raises(CorpusError, match=r"corpus\.inputs: .*nowhere: it does not exist"):
        names(folder / "nowhere")
    with pytest.raises(CorpusError, match=r"z\.bin ends in none of corpus\.suffixes"):
        names(folder / "a" / "z.bin")
    with pytest.raises(CorpusError, match=r"none of 6 files in .* counts; wanted are \.parquet"):
        names(folder, suffixes=(".parquet",))
    with pytest.raises(CorpusError, match="wanted are rows of messages"):
        names(folder, kind="chat", suffixes=(".txt", ".md"))
    (folder / "empty").mkdir()
    with pytest.raises(CorpusError, match="none of 0 files"):
        names(folder / "empty")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", ("text", None)),
        ("a.c", ("text", None)),
        ("a.txt.gz", ("text", "gzip")),
        ("a.jsonl", ("jsonl", None)),
        ("a.ndjson.zst", ("jsonl", "zstd")),
        ("a.jsonl.gz", ("jsonl", "gzip")),
        ("a.parquet", ("parquet", None)),
        ("a.feather", ("arrow", None)),
    ],
)
def test_format_by_name(name: str, expected: tuple[str, str | None]) -> None:
    assert file_format(name) == expected


def source(name: str, size: int) -> SourceFile:
    return SourceFile(uri=f"/x/{name}", name=f"0/{name}", size=size, modified_ns=1)


def test_small_files_share_a_part_and_large_rows_are_cut() -> None:
    mb = 1 << 20
    files = [
        source("a.txt", mb),
        source("b.txt", mb),
        source("c.txt", 5 * mb),
        source("d.jsonl", 5 * mb),
        source("e.jsonl.gz", 5 * mb),
        source("f.txt", 0),
    ]
    assert SMALLEST_PART_BYTES == 2 * mb
    parts = [
        [(span.file.name, span.start // mb, span.stop // mb) for span in part.spans]
        for part in plan_parts(files)
    ]
    assert parts == [
        [("0/a.txt", 0, 1), ("0/b.txt", 0, 1)],
        [("0/c.txt", 0, 5)],
        [("0/d.jsonl", 0, 2)],
        [("0/d.jsonl", 2, 4)],
        [("0/d.jsonl", 4, 5)],
        [("0/e.jsonl.gz", 0, 5)],
        [("0/f.txt", 0, 0)],
    ]


def test_a_part_knows_when_something_changed(folder: Path) -> None:
    def fingerprint(settings: str = "s") -> str:
        (part,) = plan_parts(find_files(CorpusConfig(inputs=(str(folder),))))
        return part.fingerprint(settings)

    first = fingerprint()
    assert first == fingerprint() != fingerprint("t")
    (folder / "b.txt").write_text("B.txt")
    assert fingerprint() != first


@pytest.mark.cluster
def test_a_remote_corpus(s3_environment: Any, folder: Path) -> None:
    bucket = s3_environment.bucket("corpus")
    storage.upload_tree(folder, storage.join(bucket, "raw"))
    assert names(f"{bucket}/raw", folder / "c.md")[3:] == ["0/b.txt", "0/c.md", "1/c.md"]
    assert names(f"{bucket}/raw/c.md") == ["0/c.md"]
    with pytest.raises(CorpusError, match="s3://corpus/none"):
        names(f"{bucket}/none")
