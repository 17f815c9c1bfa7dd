"""jobs.inspect_data on real shards: the report, its JSON, samples, refusals."""

import json
from pathlib import Path

import pytest

from jobs import inspect_data


def test_the_report_of_text(tmp_path: Path, tiny_shards, capsys) -> None:
    output = tmp_path / "report.json"
    inspect_data.main([str(tiny_shards.path), "--output", str(output), "--samples", "2"])
    report = json.loads(output.read_text())
    manifest = json.loads((tiny_shards.path / "train" / "manifest.json").read_text())
    train = report["splits"]["train"]
    assert (train["documents"], train["tokens"]) == (manifest["rows"], manifest["tokens"])
    assert train["digest"] == manifest["digest"]
    assert train["copies"]["exact"]["documents"] == report["leaked"]["exact"]["documents"] == 0
    shown = capsys.readouterr().out
    for word in (f"{manifest['tokens']:,}", "bits per token", "p50", "near", "shard "):
        assert word in shown
    assert shown.count(", document ") == 2


def test_the_report_of_chats_says_how_much_counts(tiny_chat_shards, capsys) -> None:
    inspect_data.main([str(tiny_chat_shards.path), "--samples", "1"])
    shown = capsys.readouterr().out
    assert "that count for the loss" in shown and "<|im_start|>" in shown


def test_what_is_no_prepared_data_is_refused(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        inspect_data.main([str(tmp_path)])
    assert ended.value.code == 2
    assert "is missing" in capsys.readouterr().err
