"""The engine behind asyncio: many streams, cancellation, failure."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from nsa_platform.config.serve import EngineConfig
from nsa_platform.serve.admission import NeverInTime, QueueFull
from nsa_platform.serve.async_engine import AsyncEngine, EngineDead
from nsa_platform.serve.engine import Engine
from nsa_platform.serve.generator import Generator
from nsa_platform.serve.request import SamplingParams
from tests.waiting import PATIENCE_S

LONG = {"max_tokens": 100, "temperature": 0.0, "ignore_eos": True}


def prompt_of(number: int) -> list[int]:
    return [(7 * number + 3 * i) % 250 for i in range(5 + number)]


@pytest.fixture(scope="module")
def model(make_speaker):
    return make_speaker()


@pytest.fixture
def serve(model, toy_tokenizer):
    """Run a coroutine with a started engine; the engine's books must be straight at the end."""

    def serve(body: Callable[[AsyncEngine], Awaitable[None]], **sizes) -> AsyncEngine:
        sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 16, **sizes}
        engine = AsyncEngine(Engine(model, toy_tokenizer, EngineConfig(**sizes)))

        async def main() -> None:
            engine.start()
            try:
                await asyncio.wait_for(body(engine), PATIENCE_S)
            finally:
                await engine.close()

        asyncio.run(main())
        engine.engine.check()
        return engine

    return serve


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


async def ids_of(engine: AsyncEngine, number: int, count: int) -> list[int]:
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    outputs = [o async for o in engine.generate(prompt_of(number), params, f"request-{number}")]
    assert outputs[-1].finish_reason == "length"
    return [token for output in outputs for token in output.token_ids]


def test_many_streams_at_once_give_what_each_gives_alone(serve, model):
    async def body(engine: AsyncEngine) -> None:
        found = await asyncio.gather(*(ids_of(engine, number, 12) for number in range(12)))
        for number, ids in enumerate(found):
            assert ids == list(Generator(model).stream(prompt_of(number), 12))
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.pages_used) == (0, 0, 0)
        assert stats.generation_tokens_total == 144
        engine.check_health()

    serve(body)


@pytest.mark.parametrize("way", ["close", "cancel", "break"])
def test_a_stream_that_is_left_gives_its_pages_back(serve, way):
    async def body(engine: AsyncEngine) -> None:
        async def listen() -> None:
            stream = engine.generate(prompt_of(20), SamplingParams(**LONG), "left")
            async for _ in stream:
                if way != "cancel":
                    break
            if way == "close":
                await stream.aclose()

        task = asyncio.create_task(listen())
        if way == "cancel":
            await until(lambda: engine.stats().generation_tokens_total > 2)
            assert engine.stats().pages_used > 0
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await task
        await until(lambda: engine.stats().pages_used == engine.stats().num_running == 0)
        assert engine.stats().generation_tokens_total < 100
        assert len(await ids_of(engine, 1, 5)) == 5
        # The id is free again.
        again = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        assert len([o async for o in engine.generate(prompt_of(20), again, "left")]) == 2

    serve(body)


def test_waiting_requests_can_be_left_too(serve):
    async def body(engine: AsyncEngine) -> None:
        first = engine.generate(prompt_of(1), SamplingParams(**LONG), "first")
        await anext(first)
        tasks = [asyncio.create_task(ids_of(engine, number, 50)) for number in range(2, 5)]
        await until(lambda: engine.stats().num_waiting == 3)
        for task in tasks:
            task.cancel()
        await until(lambda: engine.stats().num_waiting == 0)
        assert engine.stats().num_running == 1
        await first.aclose()

    serve(body, max_num_seqs=1)


def test_wrong_requests_are_refused_before_anything_runs(serve):
    async def body(engine: AsyncEngine) -> None:
        with pytest.raises(ValueError, match="the prompt is empty"):
            engine.generate([], SamplingParams(max_tokens=1), "a")
        with pytest.raises(ValueError, match=r"100 prompt tokens \+ max_tokens=29 = 129 exceed"):
            engine.generate([1] * 100, SamplingParams(max_tokens=29), "a")
        running = engine.generate(prompt_of(1), SamplingParams(**LONG), "1")
        await anext(running)
        waiting = asyncio.create_task(ids_of(engine, 2, 50))
        await until(lambda: engine.stats().num_waiting == 1)
        with pytest.raises(ValueError, match="'1' is in use"):
            engine.generate([1], SamplingParams(max_tokens=1), "1")
        with pytest.raises(QueueFull, match="2 requests run or wait"):
            engine.generate([1], SamplingParams(max_tokens=1), "3")
        waiting.cancel()
        await running.aclose()

    serve(body, max_num_seqs=1, max_num_queued=1)


def test_what_would_come_too_late_is_refused_by_its_first_output(serve):
    async def body(engine: AsyncEngine) -> None:
        running = engine.generate(prompt_of(1), SamplingParams(**LONG), "running")
        await anext(running)
        engine.engine.cost.coefficients = (0.0, 0.0, 0.01, 0.0, 0.1, 0.0)
        short = SamplingParams(max_tokens=20)
        for _ in range(2):  # a refused id is free again
            # There is one place, and it is taken.
            with pytest.raises(QueueFull, match=r"max_ttft_s is 0\.5") as refusal:
                await anext(engine.generate([1] * 20, short, "late"))
            assert refusal.value.retry_after_s > 0.0
        with pytest.raises(NeverInTime, match=r"max_ttft_s=0\.5 is less than the 0\.9 s"):
            await anext(engine.generate([1] * 90, short, "late"))
        with pytest.raises(NeverInTime, match=r"deadline_s=0\.01 is less than the 0\.09 s"):
            await anext(engine.generate([1] * 9, short, "late", deadline_s=0.01))
        await running.aclose()
        assert len(await ids_of(engine, 1, 5)) == 5
        assert engine.stats().num_running == engine.stats().num_waiting == 0

    serve(body, max_ttft_s=0.5, max_num_seqs=1)


def test_a_stream_that_never_begins_costs_nothing(serve):
    async def body(engine: AsyncEngine) -> None:
        for _ in range(5):
            stream = engine.generate(prompt_of(1), SamplingParams(**LONG), "same")
            await stream.aclose()
        assert engine.stats().steps_total == 0

    serve(body)


def test_closing_ends_the_streams(serve):
    async def body(engine: AsyncEngine) -> None:
        stream = engine.generate(prompt_of(1), SamplingParams(**LONG), "a")
        await anext(stream)
        await engine.close()
        with pytest.raises(EngineDead, match="the engine was closed"):
            async for _ in stream:
                pass
        with pytest.raises(EngineDead, match="the engine is closed"):
            engine.check_health()
        with pytest.raises(EngineDead, match="the engine is closed"):
            engine.generate(prompt_of(1), SamplingParams(**LONG), "b")

    serve(body)


def test_a_failed_step_ends_every_stream_and_shows_in_the_health(serve, model, caplog):
    def fail(*_: object) -> None:
        raise ArithmeticError("the device is gone")

    async def body(engine: AsyncEngine) -> None:
        streams = [engine.generate(prompt_of(n), SamplingParams(**LONG), f"{n}") for n in range(3)]
        for stream in streams:
            await anext(stream)
        hook = model.norm.register_forward_pre_hook(fail)
        try:
            for stream in streams:
                with pytest.raises(EngineDead, match="the device is gone") as caught:
                    async for _ in stream:
                        pass
                assert isinstance(caught.value.__cause__, ArithmeticError)
        finally:
            hook.remove()
        with pytest.raises(EngineDead, match="the device is gone"):
            engine.check_health()
        with pytest.raises(EngineDead, match="the device is gone"):
            engine.generate(prompt_of(1), SamplingParams(**LONG), "late")

    serve(body)
    assert "the engine failed" in caplog.text


def test_a_reason_outside_of_the_engine_is_told(model, toy_tokenizer, monkeypatch):
    """One rank of a model has died: the step of another fails with what its network says."""
    inner = Engine(model, toy_tokenizer, EngineConfig())

    def broken() -> None:
        raise RuntimeError("connection reset by peer")

    monkeypatch.setattr(inner, "step", broken)
    engine = AsyncEngine(inner, reason_outside=lambda: "a rank has died")

    async def body() -> None:
        engine.start()
        stream = engine.generate(prompt_of(1), SamplingParams(**LONG), "one")
        with pytest.raises(EngineDead, match="a rank has died"):
            await anext(stream)
        with pytest.raises(EngineDead, match="a rank has died"):
            engine.check_health()

    asyncio.run(body())


def test_an_engine_that_was_not_started_says_so(model, toy_tokenizer):
    engine = AsyncEngine(Engine(model, toy_tokenizer, EngineConfig()))
    with pytest.raises(EngineDead, match="the engine was not started"):
        engine.check_health()
    asyncio.run(engine.close())
