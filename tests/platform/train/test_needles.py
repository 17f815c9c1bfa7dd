"""Needles during training: the haystacks, what is counted, what cannot be."""

import json
from typing import Any

import pytest

from nsa_platform.config.base import ConfigError
from nsa_platform.config.data import LoaderConfig
from nsa_platform.config.runs import PretrainRun
from nsa_platform.config.train import NeedleCurveConfig
from nsa_platform.data.shards import open_split
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.train.mesh import alone
from nsa_platform.train.needles import (
    NeedlesFound,
    haystacks,
    held_out_filler,
    lengths_within,
    open_needles,
)
from tests.conftest import DataFolder
from tests.platform.train.tiny_run import MODEL


def test_haystacks_fill_their_length_and_are_the_same_each_time(tiny_shards: DataFolder) -> None:
    tokenizer = Tokenizer(tiny_shards.tokenizer)
    data = LoaderConfig(path=str(tiny_shards.path), context_length=128)
    shards = open_split(data, "validation")
    filler = held_out_filler(shards, tokenizer, 300)
    assert len(filler) == 300
    assert tokenizer.eos_id not in filler
    config = NeedleCurveConfig(lengths=(96, 128), depths=(0.0, 1.0), samples=2)
    made = haystacks(tokenizer, config, config.lengths, filler)
    assert [len(hay.prompt) for hay in made] == [90] * 4 + [122] * 4
    assert all(len(hay.prompt) + len(hay.answer) <= 128 for hay in made)
    assert len({hay.number for hay in made}) == len(made)
    assert made == haystacks(tokenizer, config, config.lengths, filler)
    assert lengths_within(config, 100) == (96,)
    with pytest.raises(ValueError, match=r"train\.needle\.lengths=40: .* must be more than"):
        haystacks(tokenizer, config, (40,), filler)


def test_rows_that_are_too_short_hold_no_needle(tiny_shards: DataFolder) -> None:
    data = LoaderConfig(path=str(tiny_shards.path), context_length=32)
    world: Any = None
    found = open_needles(
        open_split(data, "validation"),
        Tokenizer(tiny_shards.tokenizer),
        NeedleCurveConfig(lengths=(96,)),
        context_length=32,
        world=world,
        mesh=alone(),
    )
    assert found is None


def test_metrics_by_length_and_the_figure() -> None:
    found = NeedlesFound((64, 128), (0.0, 0.5, 1.0), [[1.0, 0.5], [1.0, 0.0], [0.25, 0.0]], 0.6)
    metrics = found.metrics()
    assert metrics == {
        "valid/needle_exact": pytest.approx(2.75 / 6),
        "valid/needle_tokens": 0.6,
        "valid/needle_exact_at/64": 0.75,
        "valid/needle_exact_at/128": pytest.approx(0.5 / 3),
    }
    assert json.loads(json.dumps(metrics)) == metrics
    (axes, _) = found.figure().axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["64", "128"]


def test_needles_longer_than_any_row_are_refused() -> None:
    tree: dict[str, Any] = {
        "name": "x",
        "model": MODEL.model_dump(mode="json"),
        "data": {"path": "unused", "context_length": 32},
        "train": {"steps": 1, "tokens_per_step": 96, "needle": {"lengths": [64, 96]}},
        "stages": [{"steps": 1, "context_length": 96}],
    }
    assert PretrainRun.parse(tree).train.needle.lengths == (64, 96)
    del tree["stages"]
    with pytest.raises(ConfigError, match=r"lengths=64 must not exceed .*=32; .*lengths=96"):
        PretrainRun.parse(tree)
