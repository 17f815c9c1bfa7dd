"""The price of an fp8 cache, measured by the command on a small model."""

import json
from pathlib import Path

import pytest

from jobs import cache_precision as job
from tests.platform.evaluate.small import export, make_corpus, make_model

LENGTH = 96


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = make_corpus(tmp_path)
    model = make_model(corpus.tokenizer.vocab_size, max_context=LENGTH)
    folder = export(corpus, model, tmp_path / "model")
    command = [str(folder), str(corpus.path), str(tmp_path / "out"), "--length"]
    job.main([*command, str(LENGTH), "--texts", "2"])
    record = json.loads((tmp_path / "out" / "cache_precision.json").read_text())
    assert record["texts"] == 2 and record["tokens"] == 2 * (LENGTH - 2)
    assert record["auto"]["cache_dtype"] == "float32"
    assert record["fp8"]["cache_dtype"] == "float8_e4m3fn"
    assert record["fp8"]["cache_bytes"] < record["auto"]["cache_bytes"]
    assert 0 < record["mean_difference"] < 0.05 < 0.9 < record["same_likeliest"] <= 1
    assert f"fp8: {record['fp8']['bits_per_byte']:.4f} bits per byte" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        job.main([*command, str(LENGTH + 1)])
    assert f"exceed max_model_len={LENGTH}" in capsys.readouterr().err
