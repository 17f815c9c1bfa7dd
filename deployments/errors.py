"""OpenAI's error shape, and how every refusal gets it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

INVALID_REQUEST = "invalid_request_error"
MAX_SHOWN = 200
MAX_PROBLEMS = 5

# Of a field that takes several shapes, pydantic reports each shape that did not fit.
SHAPES = {
    "prompt": "must be text, a list of token ids from 0, or a list of up to 128 of either",
    "stop": "must be a string or a list of up to 16 strings, none of them empty",
    "content": "must be text or a list of {type: text} parts; images and sound are not supported",
}


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Every answer that is no success."""

    error: ErrorBody


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that cannot be served, as a value that travels between processes."""

    status: int
    message: str
    type: str = INVALID_REQUEST
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The body, in ASCII: a message may quote what no encoding can write."""
        body = ErrorBody(
            message=self.message, type=self.type, param=self.param, code=self.code
        ).model_dump()
        return json.dumps({"error": body})

    def response(self) -> Response:
        return Response(
            self.to_json(),
            status_code=self.status,
            headers=dict(self.headers),
            media_type="application/json",
        )


class ApiError(Exception):
    """Raised where a request turns out to be impossible."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """The client asked for something impossible: 400."""
    return ApiError(Failure(400, message, param=param, code=code))


def unknown_model(name: str, known: Sequence[str]) -> ApiError:
    """404, as OpenAI answers."""
    return ApiError(
        Failure(
            404,
            f"The model {_shown(name)} does not exist; there is: {', '.join(known)}",
            param="model",
            code="model_not_found",
        )
    )


def overloaded(message: str, *, status: int = 429, retry_after_s: float | None = None) -> Failure:
    """Too many requests wait: 429 (or 503) with Retry-After."""
    headers = {"Retry-After": str(max(1, round(retry_after_s or 1)))}
    return Failure(status, message, type="rate_limit_error", code="overloaded", headers=headers)


def unavailable(message: str) -> Failure:
    """No replica can serve the request now: 503 with Retry-After."""
    headers = {"Retry-After": "5"}
    return Failure(503, message, type="server_error", code="unavailable", headers=headers)


def broken_off(message: str) -> Failure:
    """The answer ends before it is whole; told as the last event of a stream."""
    return Failure(502, message, type="server_error", code="broken_off")


def install_handlers(app: FastAPI) -> None:
    """Give every refusal of the app OpenAI's shape."""

    def on_failure(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.failure.response()

    def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        if isinstance(error.body, bytes):
            return _not_sent_as_json(request.headers.get("content-type")).response()
        return _from_validation(error.errors()).response()

    def on_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        phrase = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        failure = Failure(
            error.status_code, str(error.detail), code=phrase, headers=error.headers or {}
        )
        return failure.response()

    def on_surrogate(_: Request, __: Exception) -> Response:
        reason = "half of a surrogate pair, which UTF-8 cannot carry"
        return Failure(
            400, f"The body is not JSON: it holds {reason}", code="invalid_json"
        ).response()

    app.add_exception_handler(ApiError, on_failure)
    # From FastAPI itself, where it words what is wrong with a key.
    app.add_exception_handler(UnicodeEncodeError, on_surrogate)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)


def _not_sent_as_json(content_type: str | None) -> Failure:
    """A body that was not read: only what says that it is JSON is."""
    came = "no Content-Type" if content_type is None else f"Content-Type: {_shown(content_type)}"
    return Failure(
        400,
        f"The body must come with Content-Type: application/json, got {came}",
        code="invalid_content_type",
    )


def _from_validation(problems: Sequence[Any]) -> Failure:
    """400 that names each wrong field, what came and the rule; `param` is the first of them."""
    first = problems[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "malformed")
        return Failure(400, f"The body is not JSON: {reason}", code="invalid_json")
    by_param: dict[str | None, str] = {}
    for problem in problems:
        by_param.setdefault(_param(problem), _line(problem))
    lines = list(by_param.values())
    if len(lines) > MAX_PROBLEMS:
        lines[MAX_PROBLEMS:] = [f"and {len(lines) - MAX_PROBLEMS} more"]
    return Failure(400, "; ".join(lines), param=_param(first), code=first["type"])


def _param(problem: Any) -> str | None:
    """Dotted name of the field, as OpenAI gives it."""
    parts = [str(part) for part in problem["loc"][1:]]
    if parts[:1] == ["response_format"]:
        del parts[1:2]  # which of its kinds, as pydantic has it; no key of the body
    for index, part in enumerate(parts):
        if part in SHAPES:
            return ".".join(parts[: index + 1])
    if problem["type"] in ("unknown_field", "conflict"):
        parts.append(problem["ctx"]["name"])
    return ".".join(parts) or None


def _line(problem: Any) -> str:
    if problem["type"] == "conflict":
        return problem["msg"]
    name = _param(problem) or "body"
    shape = SHAPES.get(name.rpartition(".")[2])
    # A field of one shape alone has no place below its name.
    if shape is not None and problem["loc"][-1] not in SHAPES:
        return f"{name}: {shape}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("missing", "unknown_field", "unsupported"):
        return f"{name}: {message}"
    return f"{name}: {message}, got {_shown(problem.get('input'))}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
