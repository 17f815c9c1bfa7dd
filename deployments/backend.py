"""What the HTTP layer asks for answers: an interface that knows neither Ray nor torch."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Literal, Protocol

from pydantic import BaseModel

from deployments.errors import Failure

Piece = str | Failure
"""JSON of an answer or of one event of a stream, or why there is none (or no more)."""

Method = Literal["chat", "completions", "tokenize", "detokenize"]


class Backend(Protocol):
    """Models by name, each answering in pieces."""

    @property
    def models(self) -> Mapping[str, str]:
        """Where each model comes from, by its id."""
        ...

    def answer(self, model: str, method: Method, request: BaseModel) -> AsyncGenerator[Piece, None]:
        """Pieces of the answer; a Failure is the last."""
        ...

    async def max_model_len(self, model: str) -> int | None:
        """Tokens that one request may have; None while no replica can tell."""
        ...

    async def is_ready(self, model: str) -> bool:
        """Whether a replica's engine lives, or the model may be without one."""
        ...

    async def metrics(self) -> Sequence[str]:
        """Each replica's metrics in Prometheus' text format."""
        ...
