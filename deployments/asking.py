"""From a checked request to its HTTP answer: whole, or as server-sent events."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from deployments.backend import Backend, Method, Piece, Spent
from deployments.errors import Failure, unknown_model
from deployments.protocol import DetokenizeRequest, Generation, TokenizeRequest
from deployments.visits import Visit, visit_of

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Asking:
    """Puts requests to a backend, and takes down on their visits what came of them."""

    def __init__(self, backend: Backend, *, logs_bodies: bool) -> None:
        self._backend = backend
        self._logs_bodies = logs_bodies

    async def generated(self, request: Request, method: Method, body: Generation) -> Response:
        """The answer, or a stream of it. Raises ApiError for an unknown model."""
        visit = visit_of(request)
        pieces = self._pieces(visit, method, body)
        if not body.stream:
            return await _whole(visit, pieces)
        first = await anext(pieces)
        if isinstance(first, Failure):
            await pieces.aclose()
            return _refused(visit, first)
        events = _events(visit, first, pieces)
        return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)

    async def single(
        self, request: Request, method: Method, body: TokenizeRequest | DetokenizeRequest
    ) -> Response:
        """The answer. Raises ApiError for an unknown model."""
        visit = visit_of(request)
        return await _whole(visit, self._pieces(visit, method, body))

    def _pieces(
        self, visit: Visit, method: Method, body: Generation | TokenizeRequest | DetokenizeRequest
    ) -> AsyncGenerator[str | Failure, None]:
        visit.model = model_id(self._backend, body.model)
        if self._logs_bodies:
            visit.body = body.model_dump(exclude_unset=True, by_alias=True)
        pieces = self._backend.answer(visit.model, method, body, visit.request_id)
        return _counted(visit, pieces)


def model_id(backend: Backend, name: str | None) -> str:
    """The id of the model that is meant. Raises ApiError if there is none."""
    if name is None and len(backend.models) == 1:
        return next(iter(backend.models))
    if name is None or name not in backend.models:
        raise unknown_model(name or "", list(backend.models))
    return name


async def _counted(
    visit: Visit, pieces: AsyncGenerator[Piece, None]
) -> AsyncGenerator[str | Failure, None]:
    """The pieces without those that tell what was used, which goes to the visit.

    Of a stream that is left or breaks off before its end each event counts as a token.
    """
    num_events = 0
    has_settled = False
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                if isinstance(piece, Spent):
                    has_settled = has_settled or piece.completion_tokens > 0
                    visit.spend(piece)
                    continue
                num_events += isinstance(piece, str)
                yield piece
    finally:
        if num_events and not has_settled:
            visit.spend(Spent(completion_tokens=num_events))
        # Before the client has the end: it may ask again as soon as it has.
        visit.leave()


async def _whole(visit: Visit, pieces: AsyncGenerator[str | Failure, None]) -> Response:
    answer: Response | None = None
    async with aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Failure):
                return _refused(visit, piece)
            answer = Response(piece, media_type="application/json")
    assert answer is not None, "an answer ended without a piece"
    return answer


def _refused(visit: Visit, failure: Failure) -> Response:
    visit.error = failure.code
    return failure.response()


async def _events(
    visit: Visit, first: str, pieces: AsyncGenerator[str | Failure, None]
) -> AsyncGenerator[str, None]:
    """Server-sent events; one that tells of an error ends the stream, else [DONE] does."""
    async with aclosing(pieces):
        yield f"data: {first}\n\n"
        async for piece in pieces:
            if isinstance(piece, Failure):
                visit.error = piece.code
                yield f"data: {piece.to_json()}\n\n"
                return
            yield f"data: {piece}\n\n"
    yield "data: [DONE]\n\n"
