"""Reading more or fewer blocks: the loss is the patched model's own, and blocks are counted."""

import json
import re
from pathlib import Path

import pytest

from jobs import adaptive as job
from nsa_platform.evaluate.adaptive import read, reading
from nsa_platform.evaluate.bits_per_byte import bits_per_byte
from nsa_platform.evaluate.scores import ModelScorer
from nsa_platform.model.transformer import Transformer
from tests.platform.evaluate.small import Corpus, export


def test_what_is_read_and_what_it_is_worth(corpus: Corpus, model: Transformer) -> None:
    attention = model.config.attention
    assert attention.kind == "nsa"
    n, length = attention.num_selected_blocks, 3 * 4 * attention.selection_block_size
    batches = corpus.loader("validation", length).next_step(2)
    tokens = corpus.tokenizer.token_bytes()
    every = read(model, batches, tokens, num_blocks=n, top_p=None, context_length=length)
    whole = read(model, batches, tokens, num_blocks=n, top_p=1.0, context_length=length)
    few = read(model, batches, tokens, num_blocks=n, top_p=0.05, context_length=length)
    scores = {"model": ModelScorer(model).nats}
    wanted = bits_per_byte(scores, iter(batches), tokens, buckets=1, context_length=length)[
        "model"
    ].total
    assert every.bits_per_byte == pytest.approx(wanted.bits_per_byte)
    assert whole.bits_per_byte == pytest.approx(every.bits_per_byte, abs=1e-4)
    assert few.blocks < whole.blocks <= every.blocks <= n
    other = reading(model, num_blocks=n, top_p=0.05)
    assert other.embedding.weight.data_ptr() == model.embedding.weight.data_ptr()


def test_the_command(
    corpus: Corpus, model: Transformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attention = model.config.attention
    assert attention.kind == "nsa"
    n, length = attention.num_selected_blocks, 3 * 4 * attention.selection_block_size
    folder = export(corpus, model, tmp_path / "model")
    command = [str(folder), str(corpus.path), str(tmp_path / "out"), "--length", str(length)]
    job.main([*command, "--texts", "2", "--num-blocks", str(n), "--top-p", "0.05", "0.9"])
    record = json.loads((tmp_path / "out" / "adaptive.json").read_text())
    assert record["command"].startswith(f"python -m jobs.adaptive {folder} {corpus.path} ")
    assert re.fullmatch("[0-9a-f]{40}", record["commit"]) and record["date"].startswith("20")
    assert [point["selection_top_p"] for point in record["records"]] == [None, 0.05, 0.9]
    blocks = [point["blocks"] for point in record["records"]]
    assert blocks[1] <= blocks[2] <= blocks[0] and record["texts"] == 2
    assert f"top-p 0.05 of {n}: {blocks[1]:.2f} blocks a query" in capsys.readouterr().out
    assert (tmp_path / "out" / "adaptive.png").read_bytes().startswith(b"\x89PNG")
    job.main([*command, "--texts", "100000", "--num-blocks", str(n), "--top-p"])
    assert "warning: --texts=100000: there are " in capsys.readouterr().err
    taken = tmp_path / "taken"
    taken.write_text("")
    with pytest.raises(SystemExit):
        job.main([*command[:2], str(taken), *command[3:]])
    assert f"error: output={taken}: is a file, must be a folder" in capsys.readouterr().err
    for flag, value, said in (
        ("--top-p", "1.5", "argument --top-p: must be above 0 and at most 1, got '1.5'"),
        ("--top-p", "0", "argument --top-p: must be above 0 and at most 1, got '0'"),
        ("--num-blocks", "0", "--num-blocks=0 must be at least 3, the model's num_initial"),
    ):
        with pytest.raises(SystemExit):
            job.main([*command, flag, value])
        assert said in capsys.readouterr().err
