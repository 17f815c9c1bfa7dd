"""The selection rules once more, one query head and one key at a time, in plain Python.

Each rule says which keys a query head reads and where query and key stand; `attend` does the rest.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BASE = 10000.0


def rotate(x: np.ndarray, position: float) -> np.ndarray:
    """Rotary embedding of one vector, by complex numbers: channel c with channel c + K/2."""
    half = len(x) // 2
    pairs = x[:half] + 1j * x[half:]
    angles = position * BASE ** (-np.arange(half) / half)
    turned = pairs * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag])


@dataclass
class Text:
    """Queries [T, H, K], keys [T, G, K] and values [T, G, V] of one layer, before rotation."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    prompt: int
    """First tokens that are prefilled; the rest is decoded."""

    @property
    def tokens(self) -> int:
        return len(self.q)

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def share(self) -> int:
        """Query heads of a group."""
        return self.q.shape[1] // self.k.shape[1]

    def score(self, t: int, head: int, s: int, places: tuple[float, float] | None = None) -> float:
        """The scaled score of a query at t with the key at s, standing at these places."""
        at_query, at_key = places or (t, s)
        turned = rotate(self.q[t, head], at_query) @ rotate(self.k[s, head // self.share], at_key)
        return float(turned) / math.sqrt(self.q.shape[2])


Scores = dict[int, float]
"""Key -> score, of the keys that one query head reads."""
Rule = Callable[[int], list[Scores]]
"""A query position to what each head reads; called for 0, 1, 2, ... in order."""


def softmax(scores: Scores) -> Scores:
    top = max(scores.values())
    total = sum(math.exp(x - top) for x in scores.values())
    return {s: math.exp(x - top) / total for s, x in scores.items()}


def attend(text: Text, rule: Rule) -> tuple[np.ndarray, list[list[Scores]]]:
    """Out [T, H, V], and what every head of every query read."""
    out = np.zeros((text.tokens, text.heads, text.v.shape[2]))
    read = []
    for t in range(text.tokens):
        of_heads = rule(t)
        read.append(of_heads)
        for head, scores in enumerate(of_heads):
            for s, weight in softmax(scores).items():
                out[t, head] += weight * text.v[s, head // text.share]
    return out, read


def best(candidates: Scores, count: int) -> set[int]:
    """The keys with the largest scores; of equals the first."""
    return set(sorted(candidates, key=lambda s: (-candidates[s], s))[:count])


def plain(text: Text, t: int, head: int, keys: set[int] | range) -> Scores:
    return {s: text.score(t, head, s) for s in keys}


def full(text: Text) -> Rule:
    return lambda t: [plain(text, t, h, range(t + 1)) for h in range(text.heads)]


def sliding(text: Text, window: int) -> Rule:
    def rule(t: int) -> list[Scores]:
        keys = range(max(0, t - window + 1), t + 1)
        return [plain(text, t, h, keys) for h in range(text.heads)]

    return rule


def streaming(text: Text, sinks: int, recent: int) -> Rule:
    """The cache as a list, and positions that count its entries."""

    def rule(t: int) -> list[Scores]:
        cache = [s for s in range(t + 1) if s < sinks or s > t - recent]
        own = len(cache) - 1
        return [
            {s: text.score(t, h, s, (own, place)) for place, s in enumerate(cache)}
            for h in range(text.heads)
        ]

    return rule


def h2o(text: Text, heavy: int, recent: int, leading: int) -> Rule:
    """A list of kept tokens for each group, with a sum beside each."""
    groups = text.k.shape[1]
    sums: list[dict[int, float]] = [{} for _ in range(groups)]

    def rule(t: int) -> list[Scores]:
        if t >= text.prompt:
            for group in range(groups):
                forced = {s for s in sums[group] if s < leading or s >= t - recent}
                rest = {s: x for s, x in sums[group].items() if s not in forced}
                keep = forced | best(rest, heavy)
                sums[group] = {s: x for s, x in sums[group].items() if s in keep}
        read = []
        for head in range(text.heads):
            scores = plain(text, t, head, {*sums[head // text.share], t})
            read.append(scores)
        for head, scores in enumerate(read):
            group = sums[head // text.share]
            for s, weight in softmax(scores).items():
                group[s] = group.get(s, 0.0) + weight
        return read

    return rule


def exact_top(text: Text, top: int, leading: int, local: int) -> Rule:
    def of_head(t: int, head: int) -> Scores:
        everything = plain(text, t, head, range(t + 1))
        forced = {s for s in everything if s < leading or s > t - local}
        rest = {s: x for s, x in everything.items() if s not in forced}
        return {s: everything[s] for s in forced | best(rest, top)}

    return lambda t: [of_head(t, h) for h in range(text.heads)]


def quest(text: Text, page: int, pages: int, leading: int, local: int) -> Rule:
    def bound(t: int, head: int, number: int) -> float:
        tokens = range(number * page, min((number + 1) * page, t + 1))
        keys = np.stack([rotate(text.k[s, head // text.share], s) for s in tokens])
        q = rotate(text.q[t, head], t)
        return float(np.maximum(q * keys.min(0), q * keys.max(0)).sum())

    def of_head(t: int, head: int) -> Scores:
        if t < text.prompt:
            return plain(text, t, head, range(t + 1))
        forced = {s for s in range(t + 1) if s < leading or s > t - local}
        open_pages = {s // page for s in range(t + 1) if s not in forced}
        chosen = best({p: bound(t, head, p) for p in open_pages}, pages)
        keys = {s for s in range(t + 1) if s in forced or s // page in chosen}
        return plain(text, t, head, keys)

    return lambda t: [of_head(t, h) for h in range(text.heads)]


def minference(text: Text, vertical: int, slash: int, leading: int, local: int) -> Rule:
    """Sums over the map of the prompt's last 64 queries, cell by cell."""
    end = text.prompt
    lines = []
    for head in range(text.heads):
        columns = {s: math.inf if s < leading else 0.0 for s in range(end)}
        diagonals = {d: math.inf if d < local else 0.0 for d in range(end)}
        for t in range(max(0, end - 64), end):
            for s, weight in softmax(plain(text, t, head, range(t + 1))).items():
                columns[s] += weight
                diagonals[t - s] += weight
        lines.append((best(columns, vertical), best(diagonals, slash)))

    def of_head(t: int, head: int) -> Scores:
        if t >= end:
            return plain(text, t, head, range(t + 1))
        columns, diagonals = lines[head]
        keys = {s for s in range(t + 1) if s in columns or t - s in diagonals}
        return plain(text, t, head, keys)

    return lambda t: [of_head(t, h) for h in range(text.heads)]


def infllm(
    text: Text, *, initial: int, local: int, block: int, top: int, representatives: int, chunk: int
) -> Rule:
    """Blocks cut when they have left the window of a chunk's first query; far keys at one place."""
    drawn = np.zeros((text.heads, text.tokens))
    block_keys: list[np.ndarray] = []
    chosen: set[int] = set()

    def begin_chunk(first: int, last: int) -> None:
        while initial + (len(block_keys) + 1) * block <= first - local:
            start = initial + len(block_keys) * block
            of_heads = []
            for head in range(text.heads):
                weights = {s: drawn[head, s] for s in range(start, start + block)}
                tokens = best(weights, representatives)
                keys = [text.k[s, head // text.share] for s in tokens]
                of_heads.append(np.mean(keys, axis=0))
            block_keys.append(np.stack(of_heads))
        scores = {}
        for number, keys in enumerate(block_keys):
            scores[number] = 0.0
            for head in range(text.heads):
                mean = np.mean([rotate(text.q[t, head], local) for t in range(first, last)], axis=0)
                scores[number] += float(mean @ keys[head])
        chosen.clear()
        chosen.update(best(scores, top))

    def rule(t: int) -> list[Scores]:
        if t >= text.prompt:
            begin_chunk(t, t + 1)
        elif t % chunk == 0:
            begin_chunk(t, min(t + chunk, text.prompt))
        read: list[Scores] = []
        for head in range(text.heads):
            scores = {}
            for s in range(t + 1):
                number = (s - initial) // block
                if s > t - local:
                    scores[s] = text.score(t, head, s)
                elif s < initial or number >= len(block_keys) or number in chosen:
                    scores[s] = text.score(t, head, s, (local, 0))
            read.append(scores)
            for s, weight in softmax(scores).items():
                if s > t - local:
                    drawn[head, s] += weight
        return read

    return rule
