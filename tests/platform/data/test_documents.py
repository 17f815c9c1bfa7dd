"""Documents out of every format: each once, problems counted, unreadable files named."""

import gzip
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from nsa_platform.config.data import CorpusConfig
from nsa_platform.data import documents as documents_module
from nsa_platform.data.corpus import CorpusError, SourceFile, Span
from nsa_platform.data.documents import Problems, read_documents

TEXTS = ["first", "grüß\n世界", "third " * 50]


def span(path: Path, start: int = 0, stop: int | None = None) -> Span:
    size = path.stat().st_size
    file = SourceFile(uri=str(path), name=f"0/{path.name}", size=size, modified_ns=1)
    return Span(file, start, size if stop is None else stop)


def read(path: Path, **options: Any) -> tuple[list[Any], Problems]:
    problems = Problems()
    corpus = CorpusConfig(inputs=(str(path),), **options)
    return list(read_documents(span(path), corpus, problems)), problems


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def compressed(content: bytes, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def column(kind: pa.DataType) -> pa.Table:
    return pa.table({"n": [1, 2, 3], "text": pa.array(TEXTS).cast(kind)})


def write_rows(path: Path, table: pa.Table) -> None:
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=2)
        return
    open_writer = ipc.new_stream if "stream" in path.name else ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, open_writer(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_json_rows(tmp_path: Path, name: str) -> None:
    content = lines([{"text": text, "n": 1} for text in TEXTS])[:-1]
    codec = {".gz": "gzip", ".zst": "zstd"}.get(Path(name).suffix)
    (tmp_path / name).write_bytes(compressed(content, codec) if codec else content)
    assert read(tmp_path / name)[0] == TEXTS


def test_several_gzip_members_are_one_file(tmp_path: Path) -> None:
    members = [gzip.compress(lines([{"text": text}])) for text in TEXTS]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(members))
    assert read(tmp_path / "a.jsonl.gz")[0] == TEXTS


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow"])
@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_columns(tmp_path: Path, name: str, kind: pa.DataType) -> None:
    write_rows(tmp_path / name, column(kind))
    assert read(tmp_path / name)[0] == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.py", "a.txt.gz"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    content = "\ufeffgrüß\r\n\x00end".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read(tmp_path / name)[0] == ["grüß\r\n\x00end"]


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
def test_chats_come_as_they_stand(tmp_path: Path, name: str) -> None:
    rows = [CHAT, CHAT[:1]]
    if name.endswith("jsonl"):
        (tmp_path / name).write_bytes(lines([{"messages": row} for row in [*rows, None]]))
    else:
        write_rows(tmp_path / name, pa.table({"messages": [*rows, None]}))
    found, problems = read(tmp_path / name, kind="chat")
    assert found == rows
    assert problems.skipped == {"empty": 1}
    place = r" at byte \d+$" if name.endswith("jsonl") else " in row 2$"
    assert re.search(re.escape(name) + place, problems.first["empty"])


def test_other_field_names(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"content": "x"}]))
    assert read(tmp_path / "a.jsonl", text_field="content")[0] == ["x"]
    assert read(tmp_path / "a.jsonl", kind="chat", messages_field="content")[0] == ["x"]


def test_problems_are_counted(tmp_path: Path) -> None:
    rows = [{"text": "ok"}, {"text": " \n"}, {"text": None}, {"other": 1}, {"text": 5}, [1], "x"]
    broken = b'{"text": "cut\n\n   \n' + b'{"text": "\xff\xfe"}\n' + b'{"text": "a\\ud800b"}\n'
    (tmp_path / "a.jsonl").write_bytes(lines(rows) + broken)
    found, problems = read(tmp_path / "a.jsonl")
    assert found == ["ok", "\ufffd\ufffd", "a\ufffd\ufffd\ufffdb"]
    assert problems.skipped == {
        "empty": 2,
        "missing_field": 1,
        "wrong_type": 1,
        "unreadable_row": 3,
    }
    assert problems.replaced_utf8 == 2


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\xffb")
    found, problems = read(tmp_path / "a.txt")
    assert (found, problems.replaced_utf8) == (["a\ufffdb"], 1)
    found, problems = read(tmp_path / "a.txt", invalid_utf8="skip")
    assert (found, problems.skipped) == ([], {"invalid_utf8": 1})
    with pytest.raises(CorpusError, match=r"a\.txt: is not UTF-8"):
        read(tmp_path / "a.txt", invalid_utf8="error")


def test_columns_that_are_not_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"ok", b"a\xffb"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    write_rows(tmp_path / "a.arrow", pa.table({"text": column}))
    assert read(tmp_path / "a.arrow")[0] == ["ok", "a\ufffdb"]


@pytest.mark.parametrize("content", [b"", b" \n\t"])
def test_an_empty_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert read(tmp_path / "a.txt")[1].skipped == {"empty": 1}
    (tmp_path / "a.jsonl").write_bytes(content)
    assert read(tmp_path / "a.jsonl")[0] == []


def test_a_field_that_no_row_has(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"b": 1, "a": 2}] * 3))
    with pytest.raises(CorpusError, match=r"a\.jsonl: no row has the field 'text', but a, b"):
        read(tmp_path / "a.jsonl")
    for name in ("a.parquet", "a.arrow"):
        write_rows(tmp_path / name, pa.table({"a": [1], "b": [2]}))
        with pytest.raises(CorpusError, match=rf"{name}: has no column 'text', but a, b"):
            read(tmp_path / name)
        with pytest.raises(CorpusError, match=rf"{name}: column 'a' must hold text"):
            read(tmp_path / name, text_field="a")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if "jsonl" in name:
        codec = "gzip" if name.endswith("gz") else "zstd"
        rows = [{"text": f"{number} {hash(number)}" * 9} for number in range(500)]
        path.write_bytes(compressed(lines(rows), codec))
    else:
        write_rows(path, column(pa.string()))
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 3])
    with pytest.raises(CorpusError, match=rf"{name}: cannot be read"):
        read(path)


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 300), max_size=4),
    newline=st.booleans(),
    chunk=st.integers(1, 50),
)
def test_rows_of_a_cut_file_come_once_each(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    cuts: list[int],
    newline: bool,
    chunk: int,
) -> None:
    rows = [{"text": f"{number}" + "x" * size} for number, size in enumerate(sizes)]
    content = lines(rows)
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    path.write_bytes(content if newline else content[:-1])
    size = path.stat().st_size
    bounds = [0, *sorted(cut for cut in cuts if cut < size), size]
    corpus = CorpusConfig(inputs=(str(path),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "LINE_BYTES", chunk)
        found = [
            text
            for start, stop in pairwise(bounds)
            if start < stop
            for text in read_documents(span(path, start, stop), corpus, Problems())
        ]
    assert found == [row["text"] for row in rows]
