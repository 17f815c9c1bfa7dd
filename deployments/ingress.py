"""The HTTP application: OpenAI's routes, health, metrics and the chat page."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles

from deployments.backend import Backend, Method, Piece
from deployments.errors import (
    ApiError,
    ErrorReply,
    Failure,
    install_handlers,
    unavailable,
    unknown_model,
)
from deployments.exposition import CONTENT_TYPE, merged_exposition
from deployments.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generation,
    TokenizeRequest,
)
from deployments.replies import (
    ChatCompletion,
    Completion,
    Detokenized,
    Health,
    ModelCard,
    ModelList,
    Tokens,
    Version,
)
from nsa_platform import __version__

CHAT_PAGE = Path(__file__).parent / "chat"
PAGE_HEADERS = {"Content-Security-Policy": "default-src 'self'", "Cache-Control": "no-cache"}
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

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
    404: {"model": ErrorReply, "description": "There is no such model."},
    429: {"model": ErrorReply, "description": "Too many requests wait; see Retry-After."},
    503: {"model": ErrorReply, "description": "No replica can answer now; see Retry-After."},
}


def _answers(model: type, *, streams: bool) -> Responses:
    answer: dict[str, Any] = {"model": model, "description": "The answer."}
    if streams:
        answer["content"] = {"text/event-stream": {"schema": EVENT}}
    return {200: answer, **REFUSALS}


def build_app(backend: Backend) -> FastAPI:
    """The application in front of a backend. Every refusal has OpenAI's error shape."""
    app = FastAPI(
        title="NSA platform",
        version=__version__,
        description="OpenAI's API for models with Native Sparse Attention.",
        docs_url=None,
        redoc_url=None,
    )
    install_handlers(app)
    _add_generation(app, backend)
    _add_tokens(app, backend)
    _add_models(app, backend, created=int(time.time()))
    _add_operations(app, backend)
    _add_page(app)
    # 422 is FastAPI's own; ours are 400.
    _without_422(app)
    return app


def _add_generation(app: FastAPI, backend: Backend) -> None:
    @app.post("/v1/chat/completions", responses=_answers(ChatCompletion, streams=True))
    async def create_chat_completion(body: ChatCompletionRequest) -> Response:
        """The assistant's next turn, whole or as server-sent events."""
        return await _generated(backend, "chat", body)

    @app.post("/v1/completions", responses=_answers(Completion, streams=True))
    async def create_completion(body: CompletionRequest) -> Response:
        """The continuation of each prompt, whole or as server-sent events."""
        return await _generated(backend, "completions", body)


def _add_tokens(app: FastAPI, backend: Backend) -> None:
    @app.post("/tokenize", responses=_answers(Tokens, streams=False))
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text, or of a chat as it is put before the model."""
        return await _single(backend.answer(_model(backend, body.model), "tokenize", body))

    @app.post("/detokenize", responses=_answers(Detokenized, streams=False))
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Text of token ids."""
        return await _single(backend.answer(_model(backend, body.model), "detokenize", body))


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
        return await card(_model(backend, model))


def _add_operations(app: FastAPI, backend: Backend) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: REFUSALS[503]})
    async def health() -> Health:
        """Whether every model can answer."""
        for model in backend.models:
            if not await backend.is_ready(model):
                raise ApiError(unavailable(f"no replica of {model} answers"))
        return Health(status="ok")

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


def _model(backend: Backend, name: str | None) -> str:
    """The id of the model that is meant. Raises ApiError if there is none."""
    if name is None and len(backend.models) == 1:
        return next(iter(backend.models))
    if name is None or name not in backend.models:
        raise unknown_model(name or "", list(backend.models))
    return name


async def _generated(backend: Backend, method: Method, body: Generation) -> Response:
    pieces = backend.answer(_model(backend, body.model), method, body)
    if not body.stream:
        return await _single(pieces)
    first = await anext(pieces)
    if isinstance(first, Failure):
        await pieces.aclose()
        return first.response()
    events = _events(first, pieces)
    return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)


async def _single(pieces: AsyncGenerator[Piece, None]) -> Response:
    async with aclosing(pieces):
        piece = await anext(pieces)
    if isinstance(piece, Failure):
        return piece.response()
    return Response(piece, media_type="application/json")


async def _events(first: str, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[str, None]:
    """Server-sent events; one that tells of an error ends the stream, else [DONE] does."""
    async with aclosing(pieces):
        yield f"data: {first}\n\n"
        async for piece in pieces:
            if isinstance(piece, Failure):
                yield f"data: {piece.to_json()}\n\n"
                return
            yield f"data: {piece}\n\n"
    yield "data: [DONE]\n\n"
