"""Sampling: from the scores of the next token to one id.

Randomness is one uniform number for each token, drawn on the host from the request's own seed. The
same scores and seed give the same ids on any device, however requests are batched.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. The default is greedy.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 0.0
    """0: the likeliest token, always. Above: scores are divided by it."""
    top_p: float = 1.0
    """Only the likeliest tokens whose probabilities add up to this are eligible."""
    top_k: int = 0
    """Only this many of the likeliest tokens are eligible; 0: all."""
    seed: int | None = None
    """None: a fresh seed from the system."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be a finite number >= 0")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative (0: all tokens)")


class Sampler:
    """Chooses the tokens of one request, one after the other."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = random.Random(sampling.seed)

    def pick(self, logits: Tensor) -> int:
        """The next id for scores [vocab]. Equal scores: the lower id. Waits for the device."""
        if self.sampling.temperature == 0.0:
            return int(logits.argmax())
        ordered, ids = logits.double().sort(descending=True, stable=True)
        if self.sampling.top_k:
            ordered = ordered[: self.sampling.top_k]
        reached = (ordered / self.sampling.temperature).softmax(-1).cumsum(-1)
        # A token is eligible when those before it have not yet reached top_p: always the first.
        eligible = int((reached < self.sampling.top_p).sum()) + 1
        reached = reached[:eligible]
        point = self._random.random() * float(reached[-1])
        chosen = int(torch.searchsorted(reached, point, right=True))
        return int(ids[min(chosen, len(reached) - 1)])
