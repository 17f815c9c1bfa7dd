"""A crowd on one engine over real connections: mixed lengths, many who leave before the end."""

import asyncio
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2

from nsa_platform.config.serve import EngineConfig
from nsa_platform.model.weights import load_model
from nsa_platform.serve.generator import Generator
from tests.deployments.conftest import MODEL_ID, listening, local_app
from tests.waiting import PATIENCE_S, eventually

CLIENTS = 200
SECONDS = 60.0
CROWDED = EngineConfig(
    max_model_len=512,
    max_num_seqs=16,
    max_num_batched_tokens=128,
    max_num_queued=120,
    async_scheduling=True,  # as on a GPU
)
LONGEST = 40


def prompts() -> list[list[int]]:
    chance = random.Random(0)
    lengths = [3, 40, 300] * 4
    return [[chance.randrange(260, 500) for _ in range(length)] for length in lengths]


async def one_client(
    client: httpx2.AsyncClient, number: int, ends_s: float, wanted: list[list[int]]
) -> Counter[str]:
    """Asks again and again, sometimes leaving early; what came of it, checked token by token."""
    chance, found, asked = random.Random(number), Counter[str](), prompts()
    while time.monotonic() < ends_s:
        which, length = chance.randrange(len(asked)), chance.randrange(1, LONGEST)
        leaves_after = chance.randrange(length) if chance.random() < 0.4 else None
        body = {"model": MODEL_ID, "prompt": asked[which], "max_tokens": length, "stream": True,
                "temperature": 0, "ignore_eos": True, "return_token_ids": True}  # fmt: skip
        ids: list[int] = []
        is_whole = False
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code == 429:
                assert int(response.headers["retry-after"]) >= 1
                found["refused"] += 1
                await asyncio.sleep(chance.random())
                continue
            assert response.status_code == 200, response.status_code
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    is_whole = True
                elif line.startswith("data: "):
                    event: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    ids += event["choices"][0]["token_ids"]
                    if leaves_after is not None and len(ids) > leaves_after:
                        break
        assert ids == wanted[which][: len(ids)], "a token is lost, repeated or a stranger's"
        assert is_whole == (len(ids) == length) or leaves_after is not None
        found["whole" if is_whole else "left"] += 1
    return found


def test_two_hundred_clients_lose_nothing_and_leave_nothing(model_folder: Path) -> None:
    generator = Generator(load_model(model_folder).requires_grad_(False))
    wanted = [list(generator.stream(prompt, LONGEST)) for prompt in prompts()]

    async def crowd(address: str) -> Counter[str]:
        settings: Any = {"timeout": PATIENCE_S, "limits": httpx2.Limits(max_connections=None)}
        async with httpx2.AsyncClient(base_url=address, **settings) as client:
            ends_s = time.monotonic() + SECONDS
            clients = (one_client(client, number, ends_s, wanted) for number in range(CLIENTS))
            return sum(await asyncio.gather(*clients), Counter[str]())

    with local_app(model_folder, CROWDED) as (app, backend), listening(app) as address:
        found = asyncio.run(crowd(address))
        stats = backend.engine.stats
        eventually(lambda: stats().num_running + stats().num_waiting == 0, "all have ended")
        eventually(lambda: stats().pages_used == 0, "pages in use")
        assert stats().window_pages_used == 0
        backend.engine.engine.check()
        backend.engine.check_health()
    assert found.total() >= CLIENTS
    assert found["whole"] > 30 and found["left"] > 10 and found["refused"] > 0, found
