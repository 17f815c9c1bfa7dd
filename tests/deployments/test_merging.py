"""Streams that are merged, and expositions that are."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from deployments.exposition import merged_exposition
from deployments.merging import merged


class Stream:
    """Counts up; knows whether it was closed."""

    def __init__(self, count: int, *, error: Exception | None = None) -> None:
        self.count, self.error, self.is_closed = count, error, False

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            for number in range(self.count):
                await asyncio.sleep(0.001)
                yield number
            if self.error is not None:
                raise self.error
        finally:
            self.is_closed = True


@pytest.mark.parametrize("counts", [[3], [3, 0, 5]])
def test_every_item_arrives_in_its_streams_order(counts):
    async def collect() -> list[tuple[int, int]]:
        return [pair async for pair in merged([Stream(count).items() for count in counts])]

    pairs = asyncio.run(collect())
    for index, count in enumerate(counts):
        assert [item for place, item in pairs if place == index] == list(range(count))


@pytest.mark.parametrize("others", [0, 2])
def test_an_error_ends_all_and_closes_all(others):
    streams = [Stream(1, error=ValueError("no"))] + [Stream(10**6) for _ in range(others)]

    async def collect() -> None:
        async for _ in merged([stream.items() for stream in streams]):
            pass

    with pytest.raises(ValueError, match="no"):
        asyncio.run(collect())
    assert all(stream.is_closed for stream in streams)


@pytest.mark.parametrize("count", [1, 3])
def test_closing_early_closes_all(count):
    streams = [Stream(10**6) for _ in range(count)]

    async def look() -> None:
        whole = merged([stream.items() for stream in streams])
        for _ in range(count):
            await anext(whole)
        await whole.aclose()
        assert all(stream.is_closed for stream in streams)

    asyncio.run(look())


def test_expositions_of_replicas_become_one():
    one, other = (
        f'# HELP x_total About.\n# TYPE x_total counter\nx_total{{engine="{name}"}} {value}\n'
        f'# TYPE x_created gauge\nx_created{{engine="{name}"}} 1.7e9\n'
        for name, value in (("a", 1.0), ("b", 2.0))
    )
    text = merged_exposition([one, other])
    assert text.count("# TYPE x_total counter") == 1
    assert 'x_total{engine="a"} 1.0\nx_total{engine="b"} 2.0\n' in text
    assert "created" not in text
    assert merged_exposition([]) == ""
