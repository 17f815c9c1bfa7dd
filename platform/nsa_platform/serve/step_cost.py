"""How long a step takes: a linear model of its work, fitted to measured steps. No tensors.

With NSA both the work of a token and what it reads grow linearly with its context, and so they do
with full attention: six coefficients suffice. All are times, so none is negative. Two of them are
fixed: steps of decodes alone may be replayed from a graph, those with prompts are launched kernel
by kernel.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

MEMORY = 0.999
"""Weight of an observation after each later one: the last thousand count."""
SOLVE_EVERY = 16
SWEEPS = 40
MANY = 2**62


@dataclass(frozen=True, slots=True)
class StepWork:
    """What the time of a step hangs on."""

    num_prompt_tokens: int = 0
    """Tokens of chunks of prompts."""
    prompt_reads: float = 0.0
    """Sum of the contexts of these tokens."""
    num_decodes: int = 0
    """Requests that get one token."""
    decode_reads: float = 0.0
    """Sum of their contexts."""

    @classmethod
    def of(cls, prompts: Iterable[tuple[int, int]], decodes: Iterable[int] = ()) -> Self:
        """Work of chunks of prompts (new tokens, context with them), and of decodes (contexts)."""
        tokens = num_decodes = 0
        reads = decode_reads = 0.0
        for count, context in prompts:
            tokens += count
            reads += count * (context - count / 2)
        for context in decodes:
            num_decodes += 1
            decode_reads += context
        return cls(tokens, reads, num_decodes, decode_reads)

    def features(self) -> tuple[float, ...]:
        has_prompts = float(self.num_prompt_tokens > 0)
        return (
            1.0,
            has_prompts,
            self.num_prompt_tokens,
            self.prompt_reads,
            self.num_decodes,
            self.decode_reads,
        )


class CostModel:
    """Seconds of a step. Without observations it knows nothing and says 0."""

    def __init__(self, coefficients: Iterable[float] = (0.0,) * 6) -> None:
        """Coefficients: seconds of a step, of its having prompts, of a prompt token, of a token
        that it reads, of a decode, of a token that it reads."""
        self.coefficients = tuple(coefficients)
        if len(self.coefficients) != len(StepWork().features()) or min(self.coefficients) < 0:
            raise ValueError(f"coefficients={self.coefficients} must be six numbers >= 0")
        size = len(self.coefficients)
        self._squares = [[0.0] * size for _ in range(size)]
        self._products = [0.0] * size
        self._num_observed = 0

    @property
    def is_known(self) -> bool:
        """Whether it knows anything."""
        return any(self.coefficients)

    def seconds(self, work: StepWork) -> float:
        """Predicted time of a step."""
        pairs = zip(self.coefficients, work.features(), strict=True)
        return sum(coefficient * feature for coefficient, feature in pairs)

    def seconds_beside_prompts(self, decodes: StepWork) -> float:
        """Predicted time of a step with prompts, without that of their tokens."""
        return self.seconds(decodes) + self.coefficients[1]

    def prompt_seconds(self, num_tokens: int, start: int) -> float:
        """Predicted time of a prompt's tokens [start, start + num_tokens), without the fixed part
        of the steps that they take."""
        per_token, per_read = self.coefficients[2:4]
        return num_tokens * (per_token + per_read * (start + num_tokens / 2))

    def tokens_within(self, seconds: float, start: int) -> int:
        """How many tokens of a prompt, from its token `start` on, take that long."""
        if math.isinf(seconds):
            return MANY
        per_token, per_read = self.coefficients[2:4]
        # per_read / 2 n^2 + (per_token + per_read start) n = seconds
        linear = per_token + per_read * start
        divisor = linear + math.sqrt(linear**2 + 2 * per_read * seconds)
        return int(2 * seconds / divisor) if divisor > 0.0 else MANY

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learn from a step that has been measured. Every 16th time the model is fitted anew."""
        # Relative errors count: a step of 10 ms is to be known as well as one of a second.
        features = [feature / seconds for feature in work.features()]
        for row, one in enumerate(features):
            self._products[row] = MEMORY * self._products[row] + one
            for column, other in enumerate(features):
                before = self._squares[row][column]
                self._squares[row][column] = MEMORY * before + one * other
        self._num_observed += 1
        if self._num_observed % SOLVE_EVERY == 0:
            self.fit()

    def fit(self) -> None:
        """Least squares under the condition that nothing is negative, by coordinate descent from
        where it stands: what the observations say nothing about stays as it is."""
        values = list(self.coefficients)
        for _ in range(SWEEPS):
            for row in range(len(values)):
                square = self._squares[row][row]
                if square > 0.0:
                    found = sum(self._others(row, values))
                    values[row] = max(0.0, (self._products[row] - found) / square)
        self.coefficients = tuple(values)

    def _others(self, row: int, values: list[float]) -> Iterator[float]:
        for column, value in enumerate(values):
            if column != row:
                yield self._squares[row][column] * value
