"""Files of tasks: what is read as it stands, and what is refused, by line and field."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from nsa_platform.config.base import ConfigError
from nsa_platform.config.runs import EvaluateRun
from nsa_platform.config.tasks import TaskConfig
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.tasks.rows import FileRow, read_rows
from nsa_platform.evaluate.tasks.suite import open_task
from nsa_platform.evaluate.tasks.task import Task


class Note(FileRow):
    text: str


def read(folder: Path, content: str | bytes) -> list[str]:
    file = folder / "notes.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [row.text for row in read_rows(str(file), Note, source="notes")]


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\u0085"])
def test_only_a_newline_parts_rows(tmp_path: Path, end: str) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in (f"a{end}b", "c")]
    assert read(tmp_path, "\n".join(lines)) == [f"a{end}b", "c"]


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "a"}\n\n{"text": "b"}\n\n',
        '\ufeff{"text": "a"}\r\n{"text": "b"}\r\n  ',
        '\ufeff[{"text": "a"}, {"text": "b", "more": 1}]',
    ],
)
def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path, content: str) -> None:
    assert read(tmp_path, content) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}\n\n{"text": oops}', r"line 3, column 10: Expecting value"),
        ('[{"text": "a"},\n{"text": oops}]', r"line 2, column 10: Expecting value"),
        ('{"text": "a"}\n\n{"text": 7}', r"line 3: text=7: must be a valid string"),
        ('[{"text": "a"}, 7]', r"row 2 is no object, got 7; it should be notes"),
        (b"\x93NUMPY\x01", r"is no UTF-8 text \(byte 0\); it should be notes"),
        ("\n\n", r"holds no row; it should be notes"),
    ],
)
def test_what_is_no_row_is_named_by_its_line(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(ValueError, match=rf"notes\.jsonl: .*{said}") as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)


def opened(tokenizer: Tokenizer, **tree: object) -> Task:
    return open_task(TypeAdapter[TaskConfig](TaskConfig).validate_python(tree), tokenizer)


LONG_ROW = {
    "input": "Who?",
    "context": "Ann.",
    "answers": ["Ann"],
    "all_classes": None,
    "length": 9,
}


@pytest.mark.parametrize(
    ("dataset", "changes", "said"),
    [
        ("passage_retrieval_en", {"answers": ["7"]}, "answers.0='7': .*'Paragraph"),
        ("passage_retrieval_zh", {"answers": ["Paragraph 7"]}, "answers.0='Paragraph 7': .*'段落"),
        ("passage_count", {"answers": ["many"]}, "answers.0='many': "),
        ("qasper", {"answers": [1001]}, "answers.0=1001: "),
        ("qasper", {"answers": "Karl"}, "answers='Karl': must be a list"),
        ("qasper", {"answers": []}, r"answers=\[\]: must have at least 1"),
        ("qasper", {"context": None}, "context=None: "),
        ("qasper_e", {"length": "100"}, "length='100': must be a valid integer"),
        ("trec", {}, "all_classes=None: must be a list"),
    ],
)
def test_rows_of_longbench(corpus, tmp_path: Path, dataset: str, changes: Any, said: str) -> None:
    (tmp_path / f"{dataset}.jsonl").write_text(json.dumps({**LONG_ROW, **changes}))
    with pytest.raises(ValueError, match=rf"{dataset}\.jsonl: line 1: {said}"):
        opened(corpus.tokenizer, kind="longbench", folder=str(tmp_path), datasets=[dataset])


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ({"qasper": "{contex} x"}, "qasper: has an unknown place {contex}"),
        ({"qasper": 7}, "qasper: is no text, got 7"),
        ({"qasper": "{context} {"}, "qasper: has a brace that stands alone"),
        ({"qasper": "{context:d}"}, "qasper: formats context"),
        ({"qasper": "{input}"}, "qasper: has no place {context}"),
        ([["qasper", "x"]], "is not config/dataset2prompt.json"),
    ],
)
def test_prompts_of_longbench(corpus, tmp_path: Path, prompts: Any, said: str) -> None:
    (tmp_path / "qasper_e.jsonl").write_text(json.dumps(LONG_ROW))
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(prompts))
    tree = {"kind": "longbench", "folder": str(tmp_path), "datasets": ["qasper_e"]}
    with pytest.raises(ValueError, match=rf"longbench: prompts: .*prompts\.json:? {said}"):
        opened(corpus.tokenizer, **tree, prompts=str(file))


CHOICE_ROW = {
    "_id": "q1", "difficulty": "easy", "length": "short", "question": "Which?", "answer": "B",
    **{f"choice_{letter}": letter for letter in "ABCD"}, "context": "text",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"length": 3}, "length=3: must be 'short', 'medium' or 'long'"),
        ({"answer": "E"}, "answer='E': must be 'A', 'B', 'C' or 'D'"),
        ({"context": None}, "context=None: "),
    ],
)
def test_rows_of_version_2(corpus, tmp_path: Path, changes: Any, said: str) -> None:
    file = tmp_path / "data.json"
    file.write_text(json.dumps([CHOICE_ROW, {**CHOICE_ROW, **changes}]))
    with pytest.raises(ValueError, match=rf"data\.json: row 2: {said}"):
        opened(corpus.tokenizer, kind="longbench_v2", file=str(file))


@pytest.mark.parametrize(("prompt", "mark"), [("Asked $Q$", "DOC"), ("Read $DOC$", "Q")])
def test_prompts_of_version_2(corpus, tmp_path: Path, prompt: str, mark: str) -> None:
    file, own = tmp_path / "data.json", tmp_path / "own.txt"
    file.write_text(json.dumps([CHOICE_ROW]))
    own.write_text(prompt)
    with pytest.raises(ValueError, match=rf"prompt: .*own\.txt has no place \${mark}\$"):
        opened(corpus.tokenizer, kind="longbench_v2", file=str(file), prompt=str(own))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\x00", "is no UTF-8 text .* it should be JSON lines with `problem`"),
        (b'{"problem": "x", "answer": -3}', "line 1: answer=-3: must be an integer from 0 to 999"),
        (b'{"problem": "x", "answer": "-3"}', "line 1: answer='-3': must be .* from 0 to 999"),
        (b'{"problem": "x", "answer": 1000}', "line 1: answer=1000: must be .* from 0 to 999"),
        (b'{"problem": {"x": 1}, "answer": 3}', "line 1: problem={'x': 1}: must be"),
    ],
)
def test_rows_of_problems(corpus, tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "aime.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"aime\.jsonl: {said}"):
        opened(corpus.tokenizer, kind="aime", file=str(file))


IMPOSSIBLE = {"question": "?", "answers": [], "is_impossible": True}


@pytest.mark.parametrize(
    ("kind", "tree"),
    [
        ("qa_1", {"data": [{"paragraphs": [{"context": "text", "qas": [IMPOSSIBLE]}]}]}),
        ("qa_1", {"data": []}),
        ("qa_2", []),
    ],
)
def test_a_file_without_questions_is_refused(corpus, tmp_path: Path, kind: str, tree: Any) -> None:
    file = tmp_path / "qa.json"
    file.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=rf"tasks: {kind}: .*qa\.json holds no question that"):
        opened(corpus.tokenizer, kind=kind, file=str(file))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"tasks": [{"kind": "vt", "lengths": [512, 512]}]}, "tasks.0.lengths"),
        ({"tasks": [{"kind": "aime", "file": "x", "max_new_tokens": [8, 8]}]}, "max_new_tokens"),
        (
            {"tasks": [{"kind": "longbench", "folder": "x", "datasets": ["qasper", "qasper"]}]},
            "tasks.0.datasets",
        ),
        ({"needle": {"lengths": [96, 96]}}, "needle.lengths"),
        ({"needle": {"depths": [0.5, 0.5]}}, "needle.depths"),
    ],
)
def test_nothing_is_counted_twice(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: must hold each value once, got "):
        EvaluateRun.parse({"name": "x", "checkpoint": "model", "data": "data", **changes})
