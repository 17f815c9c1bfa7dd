"""Attention that chosen blocks hold, against the same said key by key."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from jobs import mechanism as job
from nsa_kernels import NsaConfig
from nsa_platform.evaluate.mechanism import block_mass, look, recall_of
from nsa_platform.model.transformer import Transformer
from tests.platform.evaluate.small import Corpus, export

# float32 sums of a few dozen shares.
CLOSE = 1e-5
BLOCK = 4


def test_block_mass_key_by_key() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 8, generator=generator)
    keys = torch.randn(11, 2, 8, generator=generator)
    places = torch.tensor([0, 6, 10])
    found = block_mass(q, keys, places, block=BLOCK, scale=0.3)
    assert found.shape == (3, 2, 3)
    for i, place in enumerate(places.tolist()):
        for group in range(2):
            wanted = [0.0, 0.0, 0.0]
            for head in (2 * group, 2 * group + 1):
                scores = [0.3 * float(q[i, head] @ keys[s, group]) for s in range(place + 1)]
                total = sum(math.exp(score) for score in scores)
                for s, score in enumerate(scores):
                    wanted[s // BLOCK] += math.exp(score) / total / 2
            assert found[i, group].tolist() == pytest.approx(wanted, abs=CLOSE)


def test_recall_of_a_choice_made_by_hand() -> None:
    config = NsaConfig(
        compression_block_size=4,
        compression_stride=4,
        selection_block_size=BLOCK,
        num_selected_blocks=2,
        num_initial_blocks=1,
        num_local_blocks=1,
        window_size=4,
    )
    mass = torch.tensor([[[0.1, 0.5, 0.3, 0.1]], [[0.7, 0.3, 0.0, 0.0]]])
    blocks = torch.tensor([[[1, 3]], [[0, -1]]])
    found = recall_of(mass, blocks, torch.tensor([13, 5]), config)
    assert found.chosen == pytest.approx((0.6 + 0.7) / 2)
    assert found.best == pytest.approx((0.8 + 1.0) / 2)
    # Blocks 0 and 3 of the first query, 0 and 1 of the second.
    assert found.forced == pytest.approx((0.2 + 1.0) / 2)
    assert found.recall == pytest.approx(0.65 / 0.9)


def test_a_model_is_looked_at(corpus: Corpus, model: Transformer) -> None:
    attention = model.config.attention
    assert attention.kind == "nsa"
    held = attention.num_selected_blocks * attention.selection_block_size
    ids = corpus.loader("validation", 3 * held).next_step(1)[0].ids
    seen = look(model, ids, queries=8)
    assert set(seen.layers) == set(seen.maps) == set(range(model.config.layers))
    assert len(seen.queries) == 8 and seen.queries[-1] == len(ids) - 1
    for layer, held_by in seen.layers.items():
        assert held_by.forced <= held_by.chosen + CLOSE and held_by.chosen <= held_by.best + CLOSE
        assert seen.maps[layer].sum(-1).tolist() == pytest.approx([1.0] * 8, abs=CLOSE)
        assert list(seen.gates[layer]) == ["cmp", "slc", "win"]
        assert all(0 < gate < 1 for gate in seen.gates[layer].values())
    with pytest.raises(ValueError, match="must be more than"):
        look(model, ids[: 2 * held], queries=8)


def test_the_command(
    corpus: Corpus, model: Transformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attention = model.config.attention
    assert attention.kind == "nsa"
    length = 3 * attention.num_selected_blocks * attention.selection_block_size
    folder = export(corpus, model, tmp_path / "model")
    command = [str(folder), str(corpus.path), str(tmp_path / "out")]
    job.main([*command, "--length", str(length), "--texts", "2", "--queries", "5"])
    record = json.loads((tmp_path / "out" / "mechanism.json").read_text())
    assert record["command"].startswith(f"python -m jobs.mechanism {folder} {corpus.path} ")
    assert re.fullmatch("[0-9a-f]{40}", record["commit"]) and record["date"].startswith("20")
    assert (record["texts"], record["queries"], record["length"]) == (2, 10, length)
    found = {each["name"]: each["value"] for each in record["records"]}
    layers = range(model.config.layers)
    assert all(0 < found[f"layer_{layer}/recall"] <= 1 + CLOSE for layer in layers)
    mean = sum(found[f"layer_{layer}/slc"] for layer in layers) / len(layers)
    assert found["slc"] == pytest.approx(mean)
    shown = capsys.readouterr().out
    assert f"layer_0/recall: {found['layer_0/recall']:.1%}, of what the best" in shown
    assert f"slc: {found['slc']:.1%}, gate" in shown
    for name in ("attention_held.png", "block_attention.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        job.main([*command, "--length", "1000000"])
    assert "must not exceed" in capsys.readouterr().err
