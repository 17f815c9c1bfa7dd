"""Which replica has seen the beginning of a prompt before, and so need not compute it again."""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from deployments.protocol import ChatCompletionRequest, CompletionRequest

BLOCK_CHARACTERS = 2048
"""Of a text: where beginnings of it end that are looked up. A token has about four."""
BLOCK_TOKENS = 512
MAX_BLOCKS = 4096
"""Of one prompt; what comes after is not looked up."""

Replica = TypeVar("Replica", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a replica is."""

    num_open: int
    """Requests that it runs or holds."""
    predicted_ttft_s: float = 0.0
    """What it last said of the wait for a first token."""

    @property
    def weight(self) -> float:
        """A second of waiting counts as a request."""
        return self.num_open + self.predicted_ttft_s


class PrefixRoutes(Generic[Replica]):
    """Remembers which replicas have read which beginnings of prompts; the latest ones.

    A request goes to the least busy of those that hold the longest beginning of it, unless they are
    too much busier than the least busy of all: then by load alone.
    """

    def __init__(
        self, *, max_imbalance: float = 8.0, max_prefixes: int = 200_000, max_holders: int = 4
    ) -> None:
        """
        Args:
            max_imbalance: weight by which a holder may exceed the least busy replica.
            max_prefixes: beginnings that are remembered.
            max_holders: replicas that are remembered for each.

        Raises:
            ValueError: a value is out of range.
        """
        if max_imbalance < 0:
            raise ValueError(f"max_imbalance={max_imbalance} must not be negative")
        for name, count in (("max_prefixes", max_prefixes), ("max_holders", max_holders)):
            if count < 1:
                raise ValueError(f"{name}={count} must be at least 1")
        self._max_imbalance = max_imbalance
        self._max_prefixes = max_prefixes
        self._max_holders = max_holders
        self._holders: OrderedDict[bytes, list[Replica]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def ranked(self, keys: Sequence[bytes], loads: Mapping[Replica, Load]) -> list[Replica]:
        """The replicas of `loads`, the best for a prompt with these beginnings first."""
        by_load = sorted(loads, key=lambda replica: loads[replica].weight)
        best = self._holder(keys, loads, by_load)
        return by_load if best is None else [best, *(one for one in by_load if one != best)]

    def routed(self, keys: Sequence[bytes], replica: Replica) -> None:
        """A prompt with these beginnings has gone to a replica."""
        for key in keys:
            holders = self._holders.setdefault(key, [])
            if replica in holders:
                holders.remove(replica)
            holders.append(replica)
            del holders[: -self._max_holders]
            self._holders.move_to_end(key)
        while len(self._holders) > self._max_prefixes:
            self._holders.popitem(last=False)

    def _holder(
        self, keys: Sequence[bytes], loads: Mapping[Replica, Load], by_load: Sequence[Replica]
    ) -> Replica | None:
        for key in reversed(keys):
            alive = [one for one in self._holders.get(key, ()) if one in loads]
            if alive:
                best = min(alive, key=lambda one: loads[one].weight)
                spare = loads[best].weight - loads[by_load[0]].weight
                return best if spare <= self._max_imbalance else None
        return None


def prefix_keys(request: object) -> list[bytes]:
    """Digests of the beginnings of a request's prompt, the longest last; none if it has no one
    prompt. Equal beginnings of different requests have equal digests."""
    if isinstance(request, ChatCompletionRequest):
        return _chat_keys(request)
    if isinstance(request, CompletionRequest):
        prompt = request.prompt
        if isinstance(prompt, str):
            return _digests([request.model], _blocks(prompt))
        ids = [each for each in prompt if isinstance(each, int)]
        if ids:
            starts = range(0, len(ids), BLOCK_TOKENS)
            pieces = [str(ids[start : start + BLOCK_TOKENS]) for start in starts]
            return _digests([request.model, "ids"], pieces)
    return []


def _chat_keys(request: ChatCompletionRequest) -> list[bytes]:
    pieces: list[str] = []
    for message in request.messages:
        content = message.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        pieces += [f"{message.role}:{block}" for block in _blocks(text)]
    return _digests([request.model], pieces)


def _blocks(text: str) -> list[str]:
    return [
        text[start : start + BLOCK_CHARACTERS] for start in range(0, len(text), BLOCK_CHARACTERS)
    ] or [""]


def _digests(salt: Sequence[str], pieces: Sequence[str]) -> list[bytes]:
    running = hashlib.blake2b("\0".join(salt).encode(), digest_size=16)
    keys: list[bytes] = []
    for piece in pieces[:MAX_BLOCKS]:
        running.update(f"{len(piece)}:{piece}".encode())
        keys.append(running.digest())
    return keys
