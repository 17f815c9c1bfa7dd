"""What the HTTP layer asks for answers: an interface that knows neither Ray nor torch."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import BaseModel

from deployments.errors import Failure


@dataclass(frozen=True, slots=True)
class Spent:
    """Tokens that a request has used."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's, those that did not have to be computed."""

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
        )


Piece = str | Spent | Failure
"""JSON of an answer or of one event of a stream; what it has used; or why there is none (or no
more). The prompt's tokens are told before the answer begins, the output's at its end."""

Method = Literal["chat", "completions", "tokenize", "detokenize"]


class Backend(Protocol):
    """Models by name, each answering in pieces."""

    @property
    def models(self) -> Mapping[str, str]:
        """Where each model comes from, by its id."""
        ...

    def answer(
        self, model: str, method: Method, request: BaseModel, request_id: str
    ) -> AsyncGenerator[Piece, None]:
        """Pieces of the answer, whose id holds request_id; a Failure is the last."""
        ...

    async def max_model_len(self, model: str) -> int | None:
        """Tokens that one request may have; None while no replica can tell."""
        ...

    async def is_ready(self, model: str) -> bool:
        """Whether a replica's engine lives, or the model may be without one."""
        ...

    async def num_requests(self) -> int:
        """Choices that are being generated or wait, over all replicas."""
        ...

    async def reset_prefix_cache(self) -> None:
        """Have every replica forget all prompts and answers."""
        ...

    async def metrics(self) -> Sequence[str]:
        """Each replica's metrics in Prometheus' text format."""
        ...
