"""The cost model finds what steps cost from steps that it has seen."""

import random

import pytest

from nsa_platform.serve.step_cost import CostModel, StepWork

TRUE = CostModel((0.002, 0.03, 2e-5, 4e-11, 2e-4, 5e-10))


def work_of(chance: random.Random) -> StepWork:
    decodes = [chance.randint(1, 100_000) for _ in range(chance.randint(0, 32))]
    prompts = [
        (count, count + chance.randint(0, 200_000))
        for count in (chance.randint(2, 4096) for _ in range(chance.randint(0, 3)))
    ]
    return StepWork.of(prompts, decodes)


def test_work_is_counted_by_chunk():
    assert StepWork.of([(4, 10), (1, 3)], [100, 7]) == StepWork(5, 34.5, 2, 107)
    assert StepWork.of([]) == StepWork()


def test_what_steps_cost_is_found_from_noisy_measurements():
    chance, cost = random.Random(0), CostModel()
    assert not cost.is_known and cost.seconds(work_of(chance)) == 0.0
    for number in range(400):
        work = work_of(chance)
        # Every fiftieth step is interrupted by something that takes half a minute.
        noise = 30.0 if number % 50 == 7 else chance.uniform(0.95, 1.05) * TRUE.seconds(work)
        cost.observe(work, noise)
    assert cost.is_known
    for _ in range(100):
        work = work_of(chance)
        assert cost.seconds(work) == pytest.approx(TRUE.seconds(work), rel=0.15)


def test_it_follows_a_device_that_becomes_slower():
    chance, cost = random.Random(1), CostModel(TRUE.coefficients)
    for _ in range(4000):
        work = work_of(chance)
        cost.observe(work, 2 * TRUE.seconds(work))
    work = work_of(chance)
    assert cost.seconds(work) == pytest.approx(2 * TRUE.seconds(work), rel=0.1)


def test_what_was_not_observed_stays_as_it_is():
    cost = CostModel(TRUE.coefficients)
    for context in range(1, 65):
        work = StepWork.of([], [1000 * context])
        cost.observe(work, 3 * TRUE.seconds(work))
    assert cost.coefficients[1:4] == TRUE.coefficients[1:4]
    assert cost.seconds(StepWork.of([], [9000])) == pytest.approx(
        3 * TRUE.seconds(StepWork.of([], [9000])), rel=0.05
    )


@pytest.mark.parametrize("start", [0, 100_000])
@pytest.mark.parametrize("seconds", [0.0, 1e-6, 0.03, 1.0])
def test_tokens_within_a_time_take_that_time(start, seconds):
    count = TRUE.tokens_within(seconds, start)
    assert TRUE.prompt_seconds(count, start) <= seconds * (1 + 1e-9)
    assert TRUE.prompt_seconds(count + 1, start) > seconds * (1 - 1e-9)
    whole = TRUE.seconds(StepWork.of([(count + 2, start + count + 2)]))
    assert whole == pytest.approx(0.032 + TRUE.prompt_seconds(count + 2, start))


def test_negative_times_are_refused():
    with pytest.raises(ValueError, match="six numbers >= 0"):
        CostModel((0.1, 0.0, -1.0, 0.0, 0.0, 0.0))
