"""Promises of the engine: what comes too late is refused, with a time after which to ask again."""

import time

import pytest

from nsa_platform.config.serve import EngineConfig
from nsa_platform.serve.admission import (
    NeverInTime,
    QueueFull,
    next_end_s,
    predicted_ttft_s,
    queued_tokens,
)
from nsa_platform.serve.engine import Engine
from nsa_platform.serve.pages import PageBook
from nsa_platform.serve.request import Request, SamplingParams
from nsa_platform.serve.scheduler import Limits, Scheduler
from nsa_platform.serve.step_cost import CostModel

# 10 ms a step, 1 ms a prompt token, 1 ms a decode.
COST = (0.01, 0.0, 0.001, 0.0, 0.001, 0.0)


def scheduler_of(num_pages: int = 1000, **limits) -> Scheduler:
    book = PageBook(page_size=8, num_pages=num_pages + 1, tail_tokens=0, num_window_pages=None)
    limits = {"max_num_seqs": 8, "max_step_tokens": 128, "max_step_s": 0.06, **limits}
    return Scheduler(book, Limits(**limits), CostModel(COST))


def add(scheduler: Scheduler, number: int, num_prompt: int, max_tokens: int = 10) -> Request:
    request = Request(
        str(number),
        (0,) * num_prompt,
        SamplingParams(max_tokens=max_tokens),
        arrival=number,
        seed=0,
        keys=scheduler.book.keys((0,) * num_prompt),
        num_to_compute=num_prompt,
    )
    scheduler.add(request)
    return request


def time_to_first(scheduler: Scheduler, request: Request) -> float:
    """What the schedule really takes by the cost model."""
    seconds = 0.0
    while not request.output_ids:
        step = scheduler.schedule()
        seconds += scheduler.cost.seconds(step.work)
        scheduler.settle(step)
        for chunk in step.chunks:
            if chunk.is_last:
                chunk.request.output_ids.append(1)
                if len(chunk.request.output_ids) == chunk.request.params.max_tokens:
                    scheduler.finish(chunk.request)
    return seconds


@pytest.mark.parametrize("having_prompts_s", [0.0, 0.08])
@pytest.mark.parametrize("num_tokens", [1, 20, 200, 900])
@pytest.mark.parametrize(
    "others",
    [
        [],
        [(500, 30)],
        [(50, 400), (30, 400), (700, 5)],
        [(300, 50)] * 7,
        [(1, 500)] * 5,
        [(1, 100)] * 8,
        [(1, 60)] * 14,
    ],
    ids=["idle", "long", "mixed", "many", "decodes", "full", "waiting"],
)
def test_predictions_are_near_what_happens(others, num_tokens, having_prompts_s):
    scheduler = scheduler_of()
    scheduler.cost.coefficients = (COST[0], having_prompts_s, *COST[2:])
    for number, (num_prompt, max_tokens) in enumerate(others):
        add(scheduler, number, num_prompt, max_tokens)
    if others:
        scheduler.settle(step := scheduler.schedule())
        for chunk in step.chunks:
            if chunk.is_last:
                chunk.request.output_ids.append(1)
    predicted = predicted_ttft_s(scheduler, num_tokens)
    found = time_to_first(scheduler, add(scheduler, 99, num_tokens))
    assert 0.5 * found < predicted < 1.7 * found + 0.02


def test_a_short_prompt_does_not_wait_for_a_long_one():
    scheduler = scheduler_of()
    add(scheduler, 0, 7000)
    assert predicted_ttft_s(scheduler, 20) < 0.1 < 10 < predicted_ttft_s(scheduler, 7000)
    assert queued_tokens(scheduler) == 7000


def test_long_prompts_wait_for_a_place_and_for_pages():
    limits = {"max_prompts": 4, "max_long_prompts": 1, "long_prompt_tokens": 500}
    scheduler = scheduler_of(**limits)
    add(scheduler, 0, 3000)
    scheduler.settle(scheduler.schedule())
    assert predicted_ttft_s(scheduler, 600) > 3.5
    assert predicted_ttft_s(scheduler, 400) < 1.1
    # Half of the pages belong to a request that may decode for seconds.
    tight = scheduler_of(num_pages=200)
    holder = add(tight, 0, 100, 1400)
    time_to_first(tight, holder)
    tight.book.extend(holder.pages, 690)
    holder.output_ids += [1] * 690
    assert predicted_ttft_s(tight, 1000) > 7 > next_end_s(tight) * 0.8
    assert predicted_ttft_s(tight, 60) < 0.2


def test_places_come_back_as_soon_as_those_of_others_did():
    scheduler = scheduler_of()
    for number in range(8):
        add(scheduler, number, 1, 1000)
    scheduler.settle(scheduler.schedule())
    late = predicted_ttft_s(scheduler, 20)
    assert late > 10
    # One ended long before it had generated all that it might: so may the others.
    ended = scheduler.running[0]
    ended.output_ids += [1] * 20
    scheduler.finish(ended)
    assert scheduler.mean_outputs == 20
    add(scheduler, 8, 1, 1000)
    scheduler.settle(scheduler.schedule())
    assert 0.2 < predicted_ttft_s(scheduler, 20) < 1.0


def test_an_engine_that_knows_nothing_promises_nothing():
    scheduler = scheduler_of()
    scheduler.cost.coefficients = (0.0,) * 6
    add(scheduler, 0, 3000)
    assert predicted_ttft_s(scheduler, 1000) == next_end_s(scheduler) == 0.0


@pytest.fixture
def engine(make_speaker, toy_tokenizer) -> Engine:
    config = EngineConfig(
        max_num_seqs=2, max_num_batched_tokens=32, max_num_queued=2, max_ttft_s=1.0
    )
    return Engine(make_speaker(), toy_tokenizer, config)


GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


def test_what_comes_too_late_is_refused_at_once(engine):
    engine.cost.coefficients = (0.01, 0.0, 0.01, 0.0, 0.01, 0.0)
    engine.add("a", [1] * 60, GREEDY)
    with pytest.raises(QueueFull, match=r"come after 1\.\d s, and max_ttft_s is 1") as refusal:
        engine.add("b", [1] * 70, GREEDY)
    # After that time, the same request meets the bound.
    assert 0.0 < refusal.value.retry_after_s < 1.0
    with pytest.raises(QueueFull, match=r"deadline_s is 0\.99"):
        engine.add("b", [1] * 70, GREEDY, deadline_s=0.99)
    # What an idle engine would not do either is no matter of now.
    with pytest.raises(NeverInTime, match=r"deadline_s=0\.2 is less than the 0\.27 s that"):
        engine.add("b", [1] * 20, GREEDY, deadline_s=0.2)
    with pytest.raises(NeverInTime, match=r"max_ttft_s=1 is less than the 1\.2 s that 90 tokens"):
        engine.add("b", [1] * 90, GREEDY)
    engine.add("b", [1] * 20, GREEDY)
    with pytest.raises(ValueError, match="deadline_s=0 must be positive"):
        engine.add("c", [1], GREEDY, deadline_s=0)
    stats = engine.stats()
    assert stats.queued_prefill_tokens == 80
    assert stats.predicted_ttft_s > 0.5
    engine.check()


def test_a_full_queue_tells_when_a_place_is_free(engine):
    for number in range(4):
        engine.add(str(number), [1, 2], GREEDY)
    engine.cost.coefficients = (0.1, 0.0, 0.0, 0.0, 0.0, 0.0)
    engine.step()
    with pytest.raises(QueueFull, match="4 requests run or wait") as refusal:
        engine.add("one more", [1], GREEDY)
    # Two that run have 19 tokens left each.
    assert refusal.value.retry_after_s == pytest.approx(1.9, rel=0.3)


def test_a_missed_deadline_ends_a_request(engine, monkeypatch):
    engine.add("patient", [1] * 90, GREEDY)
    engine.add("late", [1] * 30, GREEDY, deadline_s=5.0)
    engine.add("served", [1], GREEDY, deadline_s=5.0)
    outputs = engine.step()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 6.0)
    outputs += engine.step()
    ended = [output for output in outputs if output.finish_reason]
    assert [(o.request_id, o.finish_reason, o.stop_reason) for o in ended] == [
        (output.request_id, "abort", "deadline") for output in ended
    ]
    assert "patient" not in {output.request_id for output in ended}
    engine.check()
    while engine.has_work:
        engine.step()
        engine.check()


def test_calibration_measures_and_leaves_nothing(engine):
    engine.calibrate()
    engine.check()
    stats = engine.stats()
    assert stats.pages_used == stats.steps_total == 0
    assert engine.cost.is_known
    assert stats.predicted_ttft_s > 0.0
    engine.add("a", [1] * 60, GREEDY)
    before = engine.cost.coefficients
    while engine.has_work:
        engine.step()
        engine.check()
    assert engine.cost.coefficients != before


def test_every_step_is_learnt_from(engine, monkeypatch):
    engine.calibrate()
    works = []
    monkeypatch.setattr(engine.cost, "observe", lambda work, seconds: works.append((work, seconds)))
    engine.add("a", [1] * 90, SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    while engine.has_work:
        engine.step()
    # Those too of which nobody gets a token.
    assert [work.num_prompt_tokens > 1 for work, _ in works] == [True] * (len(works) - 1) + [False]
    assert sum(work.num_prompt_tokens for work, _ in works) == 90
    assert all(seconds > 0.0 for _, seconds in works)
