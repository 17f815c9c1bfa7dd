"""The model's deployment: one replica holds one engine."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from ray import serve

from deployments.backend import Piece
from deployments.config import LLMConfig
from deployments.followers import Followers
from deployments.loading import start_engine
from deployments.metrics import Meter
from deployments.prompts import limits_of
from deployments.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from deployments.ray_metrics import RaySink
from deployments.service import OpenAiService
from nsa_platform.model.weights import weights_digest
from nsa_platform.serve.async_engine import AsyncEngine

log = logging.getLogger("ray.serve")

PUBLISH_EVERY_S = 2.0


class LLMServer:
    """One engine and the requests it is working on, with the other ranks of its model.

    Raises:
        StartError: the model cannot be loaded; Ray Serve shows the line as reason.
    """

    def __init__(self, config: LLMConfig) -> None:
        self._followers = Followers(config) if config.num_ranks > 1 else None
        engine, folder = start_engine(config, self._followers)
        # A rank that dies also breaks the step that waits for it, perhaps before _watch is told.
        reason_outside = None if self._followers is None else self._followers.problem
        self._engine = AsyncEngine(engine, reason_outside=reason_outside)
        self._engine.start()
        self._meter = Meter(
            self._engine,
            model=config.model_id,
            replica=serve.get_replica_context().replica_id.unique_id,
            sinks=(RaySink(),),
        )
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._publish())]
        if self._followers is not None:
            self._tasks.append(loop.create_task(self._watch(self._followers)))
        self._service = OpenAiService(
            self._engine,
            engine.tokenizer,
            limits=limits_of(
                engine.tokenizer,
                max_model_len=engine.max_model_len,
                vocab_size=engine.vocab_size,
            ),
            model_id=config.model_id,
            fingerprint=weights_digest(folder),
            meter=self._meter,
        )
        log.info("serving %s from %s", config.model_id, folder)

    async def chat(
        self, request: ChatCompletionRequest, request_id: str
    ) -> AsyncGenerator[Piece, None]:
        """Pieces of a chat's answer."""
        async with aclosing(self._service.chat(request, request_id)) as pieces:
            async for piece in pieces:
                yield piece

    async def completions(
        self, request: CompletionRequest, request_id: str
    ) -> AsyncGenerator[Piece, None]:
        """Pieces of continuations."""
        async with aclosing(self._service.completions(request, request_id)) as pieces:
            async for piece in pieces:
                yield piece

    async def tokenize(
        self, request: TokenizeRequest, request_id: str
    ) -> AsyncGenerator[Piece, None]:
        """Ids of a text or chat; the answer has no id."""
        yield await self._service.tokenize(request)

    async def detokenize(
        self, request: DetokenizeRequest, request_id: str
    ) -> AsyncGenerator[Piece, None]:
        """Text of ids; the answer has no id."""
        yield await self._service.detokenize(request)

    async def max_model_len(self) -> int:
        """Tokens that one request may have."""
        return self._service.limits.max_model_len

    async def is_healthy(self) -> bool:
        """Whether the engine lives. Raises if not."""
        self._engine.check_health()
        return True

    async def metrics(self) -> str:
        """This replica's metrics in Prometheus' text format."""
        return self._meter.exposition()

    async def num_requests(self) -> int:
        """Choices that are being generated or wait."""
        return self._service.num_requests()

    async def reset_prefix_cache(self) -> None:
        """Forget all prompts and answers."""
        self._service.reset_prefix_cache()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What KvPressurePolicy decides by."""
        stats = self._engine.stats()
        return {
            "kv_cache_usage": stats.pages_used / stats.pages_total,
            "queued_prefill_tokens": float(stats.queued_prefill_tokens),
            "predicted_ttft_s": stats.predicted_ttft_s,
            "num_requests": float(stats.num_running + stats.num_waiting),
        }

    def record_routing_stats(self) -> dict[str, float]:
        """What PrefixCacheRouter knows of this replica beside its open requests."""
        return {"predicted_ttft_s": self._engine.stats().predicted_ttft_s}

    def check_health(self) -> None:
        """Raises if the engine has died; Ray Serve then replaces the replica."""
        self._engine.check_health()

    async def _publish(self) -> None:
        """Tell Ray's exporter again and again what the engine does."""
        while True:
            self._meter.publish()
            await asyncio.sleep(PUBLISH_EVERY_S)

    async def _watch(self, followers: Followers) -> None:
        """Without one of its ranks the engine can do nothing, and may wait for it for ever."""
        self._engine.fail(RuntimeError(await followers.ended()))

    async def __del__(self) -> None:
        if hasattr(self, "_service"):
            for task in self._tasks:
                task.cancel()
            self._service.close()
            await self._engine.close()
            if self._followers is not None:
                self._followers.end()
