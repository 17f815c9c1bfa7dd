"""Chats from documentation strings: what is taken, and what is said of the rest."""

import json
from pathlib import Path

import pytest

from jobs.docstring_chats import write_chats


def test_what_cannot_be_read_is_counted(tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "good.py").write_text('def add(a, b):\n    """Add two numbers."""\n')
    (sources / "broken.py").write_text("def f(:\n")
    (sources / "latin.py").write_bytes(b"# caf\xe9\n")
    written = write_chats(sources, tmp_path / "chats.jsonl")
    assert written.chats == 2
    assert [path.name for path in written.unreadable] == ["broken.py", "latin.py"]
    first = json.loads((tmp_path / "chats.jsonl").read_text().splitlines()[0])["messages"]
    assert first[0]["content"] == "What does good.add do?"
    assert first[1]["content"] == "Add two numbers."


def test_nothing_to_take_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: is no folder"):
        write_chats(tmp_path / "nowhere", tmp_path / "out" / "chats.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no documentation string found"):
        write_chats(tmp_path / "empty", tmp_path / "chats.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
