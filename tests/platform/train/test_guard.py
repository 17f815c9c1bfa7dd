"""Which steps are skipped, and when a run gives up."""

import json
import math

import pytest

from nsa_platform.config.train import GuardConfig
from nsa_platform.train.guard import FEWEST_STEPS, WINDOW, Guard, TrainingDiverged


def steady(guard: Guard, steps: int) -> None:
    """Losses around 2 and norms around 1."""
    for step in range(steps):
        wave = 0.1 * math.sin(step)
        assert guard.judge(step, loss=2 + wave, grad_norm=1 - wave) is None


@pytest.mark.parametrize(
    ("loss", "norm", "named"),
    [
        (math.nan, 1.0, "train/loss is nan"),
        (math.inf, 1.0, "train/loss is inf"),
        (2.0, math.nan, "train/grad_norm is nan"),
        (2.0, math.inf, "train/grad_norm is inf"),
    ],
)
def test_what_is_not_finite_is_skipped(loss: float, norm: float, named: str) -> None:
    guard = Guard(GuardConfig())
    assert guard.judge(1, loss=loss, grad_norm=norm) == named
    assert guard.judge(2, loss=100.0, grad_norm=100.0) is None
    assert (guard.skipped, guard.in_a_row) == (1, 0)


def test_spikes_are_skipped_when_asked_for_and_do_not_count_as_usual() -> None:
    lax, strict = Guard(GuardConfig()), Guard(GuardConfig(spike_sigmas=6.0))
    for guard in (lax, strict):
        steady(guard, WINDOW + 10)
    assert lax.judge(1, loss=9.0, grad_norm=1.0) is None
    said = strict.judge(1, loss=9.0, grad_norm=1.0)
    assert said is not None and said.startswith("train/loss is 9, above 2.")
    assert "train/grad_norm is 5" in str(strict.judge(2, loss=2.0, grad_norm=5.0))
    assert strict.judge(3, loss=2.2, grad_norm=1.0) is None
    assert 9.0 not in strict.losses and 5.0 not in strict.norms
    assert len(strict.losses) == WINDOW


def test_the_first_steps_are_no_spikes() -> None:
    guard = Guard(GuardConfig(spike_sigmas=1.0))
    for step in range(FEWEST_STEPS):
        assert guard.judge(step, loss=float(step), grad_norm=1.0) is None


def test_too_many_in_a_row_end_the_run() -> None:
    guard = Guard(GuardConfig(halt_after=3))
    for step in (1, 2):
        assert guard.judge(step, loss=math.nan, grad_norm=1.0)
    assert guard.judge(3, loss=1.0, grad_norm=1.0) is None
    for step in (4, 5):
        assert guard.judge(step, loss=math.nan, grad_norm=1.0)
    with pytest.raises(
        TrainingDiverged, match=r"train/loss is nan at step 6.* of 3 steps in a row"
    ):
        guard.judge(6, loss=math.nan, grad_norm=1.0)


def test_a_resumed_guard_judges_alike() -> None:
    config = GuardConfig(spike_sigmas=4.0)
    guard = Guard(config)
    steady(guard, 50)
    guard.judge(51, loss=math.nan, grad_norm=1.0)
    again = Guard.from_dict(config, json.loads(json.dumps(guard.to_dict())))
    assert again == guard
    for each in (guard, again):
        assert each.judge(52, loss=2.5, grad_norm=1.0)
    assert again == guard


def test_what_is_forgotten_is_no_measure_of_what_comes() -> None:
    guard = Guard(GuardConfig(spike_sigmas=6.0))
    steady(guard, WINDOW)
    assert guard.judge(1, loss=9.0, grad_norm=1.0) is not None
    guard.forget()
    assert guard.judge(2, loss=9.0, grad_norm=9.0) is None
    assert guard.skipped == 1
