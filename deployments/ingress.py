"""The HTTP application: OpenAI's routes, health, metrics and the chat page."""

import asyncio
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles

from deployments.asking import Asking, model_id
from deployments.backend import Backend
from deployments.errors import (
    ApiError,
    ErrorReply,
    install_handlers,
    unavailable,
)
from deployments.exposition import CONTENT_TYPE, merged_exposition
from deployments.gate import Gate
from deployments.keys import AccessSettings, read_keys
from deployments.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from deployments.replies import (
    ChatCompletion,
    Completion,
    Detokenized,
    Health,
    Load,
    ModelCard,
    ModelList,
    Tokens,
    Version,
)
from nsa_platform import __version__

CHAT_PAGE = Path(__file__).parent / "chat"
PAGE_HEADERS = {"Content-Security-Policy": "default-src 'self'", "Cache-Control": "no-cache"}

Responses = dict[int | str, dict[str, Any]]

EVENT = {
    "description": "One server-sent event.",
    "type": "object",
    "properties": {
        "data": {"type": "string", "description": "JSON of a chunk or an error, or [DONE]."}
    },
    "required": ["data"],
}

REFUSALS: Responses = {
    400: {"model": ErrorReply, "description": "The request is malformed or impossible."},
    401: {"model": ErrorReply, "description": "There is no API key with it, or a wrong one."},
    404: {"model": ErrorReply, "description": "There is no such model."},
    429: {"model": ErrorReply, "description": "Too many requests, or too many of this key's."},
    503: {"model": ErrorReply, "description": "No replica can answer now; see Retry-After."},
}


def _answers(model: type, *, streams: bool) -> Responses:
    answer: dict[str, Any] = {"model": model, "description": "The answer."}
    if streams:
        answer["content"] = {"text/event-stream": {"schema": EVENT}}
    return {200: answer, **REFUSALS}


def build_app(
    backend: Backend,
    access: AccessSettings | None = None,
    *,
    processes: int = 1,
    has_proxy: bool = False,
) -> FastAPI:
    """The application in front of a backend. Every refusal has OpenAI's error shape.

    Args:
        access: keys and logs; None: anybody may ask, and nothing of it is kept.
        processes: how many such applications share the limits of keys.
        has_proxy: Ray Serve's stands in front, and gives requests their ids.

    Raises:
        ConfigError: the keys cannot be read.
    """
    access = access or AccessSettings(log_requests=False)
    app = FastAPI(
        title="NSA platform",
        version=__version__,
        description="OpenAI's API for models with Native Sparse Attention.",
        docs_url=None,
        redoc_url=None,
    )
    install_handlers(app)
    app.add_middleware(
        Gate,
        keys=read_keys(access),
        processes=processes,
        is_logged=access.log_requests,
        has_proxy=has_proxy,
    )
    ask = Asking(backend, logs_bodies=access.log_prompts)
    _add_generation(app, ask)
    _add_tokens(app, ask)
    _add_models(app, backend, created=int(time.time()))
    _add_operations(app, backend)
    _add_page(app)
    # 422 is FastAPI's own; ours are 400.
    _without_422(app)
    return app


def _add_generation(app: FastAPI, ask: Asking) -> None:
    @app.post("/v1/chat/completions", responses=_answers(ChatCompletion, streams=True))
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """The assistant's next turn, whole or as server-sent events."""
        return await ask.generated(request, "chat", body)

    @app.post("/v1/completions", responses=_answers(Completion, streams=True))
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """The continuation of each prompt, whole or as server-sent events."""
        return await ask.generated(request, "completions", body)


def _add_tokens(app: FastAPI, ask: Asking) -> None:
    @app.post("/tokenize", responses=_answers(Tokens, streams=False))
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Token ids of a text, or of a chat as it is put before the model."""
        return await ask.single(request, "tokenize", body)

    @app.post("/detokenize", responses=_answers(Detokenized, streams=False))
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """Text of token ids."""
        return await ask.single(request, "detokenize", body)


def _add_models(app: FastAPI, backend: Backend, *, created: int) -> None:
    async def card(model: str) -> ModelCard:
        return ModelCard(
            id=model,
            object="model",
            created=created,
            owned_by="nsa-platform",
            root=backend.models[model],
            max_model_len=await backend.max_model_len(model),
        )

    @app.get("/v1/models")
    async def list_models() -> ModelList:
        """Every model that is served."""
        cards = await asyncio.gather(*(card(model) for model in backend.models))
        return ModelList(object="list", data=cards)

    @app.get("/v1/models/{model:path}", responses={404: REFUSALS[404]})
    async def retrieve_model(model: str) -> ModelCard:
        """One model."""
        return await card(model_id(backend, model))


def _add_operations(app: FastAPI, backend: Backend) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: REFUSALS[503]})
    async def health() -> Health:
        """Whether every model can answer."""
        for model in backend.models:
            if not await backend.is_ready(model):
                raise ApiError(unavailable(f"no replica of {model} answers"))
        return Health(status="ok")

    @app.get("/load")
    async def show_load() -> Load:
        """How much is being generated or waits."""
        return Load(server_load=await backend.num_requests())

    @app.post("/reset_prefix_cache", responses={401: REFUSALS[401], 429: REFUSALS[429]})
    async def reset_prefix_cache() -> Response:
        """Have every replica forget all prompts and answers; what is being generated goes on."""
        await backend.reset_prefix_cache()
        return Response()

    @app.get("/version")
    async def show_version() -> Version:
        """Version of the platform."""
        return Version(version=app.version)

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Prometheus metrics of all replicas."""
        text = merged_exposition(await backend.metrics())
        return Response(text, headers={"Content-Type": CONTENT_TYPE})


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def chat_page() -> FileResponse:
        return FileResponse(CHAT_PAGE / "index.html", headers=PAGE_HEADERS)

    app.mount("/chat", StaticFiles(directory=CHAT_PAGE), name="chat")


def _without_422(app: FastAPI) -> None:
    document = app.openapi()
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    app.openapi_schema = document
