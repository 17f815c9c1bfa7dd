"""What an EvaluateRun refuses before a model or a file is looked at."""

from typing import Any

import pytest

from nsa_platform.config.base import ConfigError
from nsa_platform.config.runs import EvaluateRun


def parsed(**changes: Any) -> EvaluateRun:
    return EvaluateRun.parse({"name": "x", "checkpoint": "model", "data": "data", **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"bits_per_byte": {"context_length": 64, "position_buckets": 65}},
            "bits_per_byte: position_buckets=65 must not exceed context_length=64",
        ),
        ({"bits_per_byte": None, "needle": None}, "there is nothing to measure"),
        ({"bits_per_byte": None, "needle": None, "baselines": {}}, "there is nothing to measure"),
        (
            {"baselines": {"budget": "published", "tokens": 40}},
            "baselines: tokens=40 is of no use to budget=published",
        ),
        (
            {"baselines": {"budget": "published", "nsa": {"window_size": 64}}},
            "is of no use to budget=published",
        ),
        (
            {"baselines": {"minference": {"tokens": 1}}},
            "baselines.minference.tokens: must be greater than or equal to 128",
        ),
        (
            {"tasks": [{"kind": "mqar", "vocabulary": 8}]},
            "vocabulary=8 must lie in [2 x pairs",
        ),
    ],
)
def test_what_measures_nothing_or_is_of_no_use_is_named(changes: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(**changes)
    assert said in str(caught.value)


def test_one_thing_to_measure_is_enough() -> None:
    task = {"kind": "mqar", "pairs": 4, "vocabulary": 8}
    assert parsed(bits_per_byte=None, needle=None, tasks=[task]).tasks
    assert parsed(bits_per_byte=None).bits_per_byte is None
    assert parsed(needle=None, baselines={"tokens": 40}).baselines
    assert parsed(baselines={"budget": "published"}).baselines
