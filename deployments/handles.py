"""The HTTP deployment, and Ray Serve's handles as its backend."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from deployments.backend import Method, Piece, Spent
from deployments.config import LLMConfig, LLMServingArgs
from deployments.errors import broken_off, overloaded, unavailable
from deployments.ingress import build_app
from deployments.metric_families import FAMILIES
from deployments.ray_metrics import RaySink
from deployments.visits import log_to_stdout

ATTEMPTS = 3
LOOK_TIMEOUT_S = 5.0


class ServeBackend:
    """The models' deployments of this application."""

    def __init__(
        self, configs: Sequence[LLMConfig], handles: Mapping[str, DeploymentHandle]
    ) -> None:
        self.models = {
            config.model_id: config.model_loading_config.model_source for config in configs
        }
        self._backpressure = {
            config.model_id: config.deployment_config.backpressure_config for config in configs
        }
        self._may_sleep = {
            config.model_id
            for config in configs
            if config.deployment_config.autoscaling_config is not None
            and config.deployment_config.autoscaling_config.min_replicas == 0
        }
        self._handles = handles
        self._metrics = RaySink()
        self._max_model_len: dict[str, int] = {}

    async def answer(
        self, model: str, method: Method, request: BaseModel, request_id: str
    ) -> AsyncGenerator[Piece, None]:
        handle = self._handles[model].options(stream=True, method_name=method)
        has_begun = has_told = False
        for attempt in range(ATTEMPTS):
            pieces = handle.remote(request, request_id)
            assert isinstance(pieces, DeploymentResponseGenerator)
            try:
                async for piece in pieces:
                    if isinstance(piece, Spent) and not has_begun:
                        # A prompt is paid once, however many replicas read it.
                        if has_told:
                            continue
                        has_told = True
                    else:
                        has_begun = True
                    yield piece
                return
            except BackPressureError as error:
                self._count_refusal(model)
                answer = self._backpressure[model]
                yield overloaded(
                    str(error), status=answer.status_code, retry_after_s=answer.retry_after_s
                )
                return
            except DeploymentUnavailableError as error:
                yield unavailable(error.message)
                return
            except (RayActorError, ReplicaUnavailableError):
                # Nothing of it has reached the client yet: another replica can do it all.
                if not has_begun and attempt + 1 < ATTEMPTS:
                    continue
                text = "the replica that was answering has gone; ask again"
                yield broken_off(text) if has_begun else unavailable(text)
                return
            except RayError as error:
                text = f"the answer broke off: {str(error).strip().splitlines()[-1]}"
                yield broken_off(text) if has_begun else unavailable(text)
                return
            except (asyncio.CancelledError, GeneratorExit):
                # The client has gone, or wants no more: the replica stops generating.
                pieces.cancel()
                raise

    async def max_model_len(self, model: str) -> int | None:
        if model not in self._max_model_len:
            for length in await self._ask_all(model, "max_model_len"):
                self._max_model_len[model] = int(length)
        return self._max_model_len.get(model)

    async def is_ready(self, model: str) -> bool:
        return model in self._may_sleep or bool(await self._ask_all(model, "is_healthy"))

    async def num_requests(self) -> int:
        asked = [await self._ask_all(model, "num_requests") for model in self.models]
        return sum(map(sum, asked))

    async def reset_prefix_cache(self) -> None:
        for model in self.models:
            await self._ask_all(model, "reset_prefix_cache")

    async def metrics(self) -> Sequence[str]:
        return [text for model in self.models for text in await self._ask_all(model, "metrics")]

    def _count_refusal(self, model: str) -> None:
        """One that no replica has seen, and so none can count."""
        labels = {"model_name": model, "engine": "ingress", "reason": "overloaded"}
        self._metrics.record(FAMILIES["admission_rejections"], 1, labels)

    async def _ask_all(self, model: str, method: str) -> list[Any]:
        """What each replica answers; of those that do not, nothing."""
        try:
            results = await (
                self._handles[model]
                .broadcast(method)
                .results_async(timeout_s=LOOK_TIMEOUT_S, return_exceptions=True)
            )
        except (RayError, DeploymentUnavailableError, TimeoutError):
            return []
        return [result for result in results if not isinstance(result, BaseException)]


class OpenAiIngress:
    """HTTP in front of the models' deployments."""

    def __init__(self, args: LLMServingArgs, *handles: DeploymentHandle) -> None:
        names = [config.model_id for config in args.llm_configs]
        self._backend = ServeBackend(args.llm_configs, dict(zip(names, handles, strict=True)))
        self._access = args.access
        self._processes = args.ingress_deployment_config.num_replicas

    def __serve_build_asgi_app__(self) -> FastAPI:
        log_to_stdout()
        return build_app(self._backend, self._access, processes=self._processes, has_proxy=True)
