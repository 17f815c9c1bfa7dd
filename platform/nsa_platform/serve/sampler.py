"""Sampling: from the scores of the next token to one id.

Randomness is one uniform number for each token, a function of the request's seed and the token's
number in the output. So the same scores and seed give the same ids on any device, however requests
are batched, and after any interruption.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nsa_platform.serve.transfer import on_device


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
    min_p: float = 0.0
    """Only tokens at least this share as likely as the likeliest one are eligible."""
    seed: int | None = None
    """None: a fresh seed from the system."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be a finite number >= 0")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative (0: all tokens)")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p={self.min_p} must lie in [0, 1]")


class Choice(Protocol):
    """The settings that choose_tokens reads."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def min_p(self) -> float: ...


class Sampler:
    """Chooses the tokens of one request, one after the other."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._seed = random.getrandbits(64) if sampling.seed is None else sampling.seed
        self._num_picked = 0

    def pick(self, logits: Tensor) -> int:
        """The next id for scores [vocab]. Equal scores: the lower id. Waits for the device."""
        point = uniform(self._seed, self._num_picked)
        self._num_picked += 1
        return int(choose_tokens(logits[None], [self.sampling], [point]))


def uniform(seed: int, index: int) -> float:
    """The number of a seed's random sequence at an index: in [0, 1), 53 bits."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def seed_of(engine_seed: int, request_id: str) -> int:
    """A seed for a request that brings none: the same in every engine of the same seed."""
    digest = hashlib.sha256(f"{engine_seed}/{request_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def choose_tokens(scores: Tensor, choices: Sequence[Choice], points: Sequence[float]) -> Tensor:
    """One id for each row of scores [B, vocab], int64 [B]: each row by its own settings alone.
    Does not wait for the device.

    points: where in [0, 1) each row's draw falls; a greedy row needs none.
    """
    ids = scores.argmax(-1)
    rows = [row for row, choice in enumerate(choices) if choice.temperature > 0.0]
    if rows:
        places = on_device(rows, torch.int64, scores.device)
        drawn = _draw(scores[places], [choices[row] for row in rows], [points[row] for row in rows])
        ids[places] = drawn
    return ids


def _draw(scores: Tensor, choices: Sequence[Choice], points: Sequence[float]) -> Tensor:
    vocab = scores.shape[-1]
    values = [
        (choice.temperature, choice.top_p, choice.top_k or vocab, choice.min_p, point)
        for choice, point in zip(choices, points, strict=True)
    ]
    settings = on_device(values, torch.float64, scores.device)
    temperature, top_p, top_k, min_p, point = settings.split(1, dim=1)  # [B, 1]
    ordered, ids = scores.double().sort(descending=True, stable=True)
    ordered = (ordered - ordered[:, :1]) / temperature
    is_cut = torch.arange(vocab, device=scores.device) >= top_k
    ordered = ordered.masked_fill(is_cut | (ordered < min_p.log()), -torch.inf)
    reached = ordered.softmax(-1).cumsum(-1)
    # A token is eligible when those before it have not yet reached top_p: always the first.
    last = (reached < top_p).sum(-1, keepdim=True)
    last = torch.minimum(last, (ordered > -torch.inf).sum(-1, keepdim=True) - 1)
    chosen = torch.searchsorted(reached, point * reached.gather(1, last), right=True)
    return ids.gather(1, torch.minimum(chosen, last)).squeeze(1)
