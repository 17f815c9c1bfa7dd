"""Learning rates by hand."""

import pytest

from nsa_platform.config.train import OptimizerConfig
from nsa_platform.train.schedule import learning_rate


def rates(steps: int, **config: object) -> list[float]:
    settings = OptimizerConfig.model_validate({"learning_rate": 1.0, "min_lr_factor": 0.1} | config)
    return [learning_rate(step, config=settings, steps=steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_warm_up_reaches_the_peak_with_its_last_step(schedule: str) -> None:
    assert rates(100, schedule=schedule, warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 5])
def test_ends_exactly_at_the_least(schedule: str, warmup_steps: int) -> None:
    found = rates(20, schedule=schedule, warmup_steps=warmup_steps)
    assert found[-1] == pytest.approx(0.1)
    after = found[warmup_steps:]
    assert after == sorted(after, reverse=True)


def test_cosine_is_half_way_in_the_middle() -> None:
    assert rates(11, schedule="cosine")[5] == pytest.approx((1.0 + 0.1) / 2)


def test_wsd_stays_then_falls_in_equal_steps() -> None:
    found = rates(10, schedule="wsd", decay_fraction=0.3)
    assert found[:7] == [1.0] * 7
    assert found[7:] == pytest.approx([0.7, 0.4, 0.1])


def test_wsd_without_decay_never_falls() -> None:
    assert rates(5, schedule="wsd", decay_fraction=0.0) == [1.0] * 5


def test_wsd_that_only_decays_starts_below_the_peak() -> None:
    assert rates(4, schedule="wsd", decay_fraction=1.0) == pytest.approx([0.775, 0.55, 0.325, 0.1])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_degenerate_lengths(schedule: str) -> None:
    assert rates(1, schedule=schedule) == pytest.approx([0.1 if schedule == "cosine" else 1.0])
    assert rates(3, schedule=schedule, warmup_steps=9) == pytest.approx([1 / 9, 2 / 9, 3 / 9])
