"""The selection rules once more, one query head and one key at a time, in plain Python.

Each rule says which keys a query head reads and where query and key stand; `attend` does the rest.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile

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
    known: dict[tuple[float, ...], float] = field(default_factory=dict)
    """Scores that were asked for."""

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
        cell = (t, head, s, at_query, at_key)
        if cell not in self.known:
            q, k = self.q[t, head], self.k[s, head // self.share]
            turned = float(rotate(q, at_query) @ rotate(k, at_key))
            self.known[cell] = turned / math.sqrt(len(q))
        return self.known[cell]


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


Pattern = tuple[str, int, int]
"""a-shape, leading, local; lines, columns, diagonals; or blocks, how many, 0."""
Cells = set[tuple[int, int]]
"""Pairs of a query and a key."""


def pattern_cells(
    text: Text, head: int, pattern: Pattern, *, tile: int, leading: int, local: int
) -> Cells:
    """The cells of a head's map of the prompt that a pattern reads, found cell by cell."""
    end = text.prompt
    causal = {(t, s) for t in range(end) for s in range(t + 1)}
    kind, first, second = pattern
    if kind == "a-shape":
        return {(t, s) for t, s in causal if s < first or s > t - second}
    if kind == "blocks":
        blocks = [range(a, min(a + tile, end)) for a in range(0, end, tile)]
        group = head // text.share
        means = {
            number: np.mean([rotate(text.k[s, group], s) for s in block], axis=0)
            for number, block in enumerate(blocks)
        }
        cells = set()
        for number, block in enumerate(blocks):
            q = np.mean([rotate(text.q[t, head], t) for t in block], axis=0)
            chosen = best({n: float(q @ means[n]) for n in range(number + 1)}, first)
            cells |= {(t, s) for t in block for n in chosen for s in blocks[n]}
        return cells & causal
    columns = {s: math.inf if s < leading else 0.0 for s in range(end)}
    diagonals = {d: math.inf if d < local else 0.0 for d in range(end)}
    for t in range(max(0, end - 64), end):
        for s, weight in softmax(plain(text, t, head, range(t + 1))).items():
            columns[s] += weight
            diagonals[t - s] += weight
    kept, near = best(columns, first), best(diagonals, second)
    cells = {(t, s) for t, s in causal if s in kept}
    for t in range(-(-end // tile) * tile):
        square = range(t // tile * tile, t // tile * tile + tile)
        cells |= {(other, t - d) for d in near for other in square}
    return cells & causal


def minference(text: Text, patterns: list[Pattern], *, tile: int, leading: int, local: int) -> Rule:
    """A pattern for each head, in the prompt."""
    sizes = {"tile": tile, "leading": leading, "local": local}
    cells = [pattern_cells(text, head, each, **sizes) for head, each in enumerate(patterns)]

    def rule(t: int) -> list[Scores]:
        if t >= text.prompt:
            return full(text)(t)
        return [
            plain(text, t, head, {s for s in range(t + 1) if (t, s) in cells[head]})
            for head in range(text.heads)
        ]

    return rule


def best_pattern(
    text: Text,
    head: int,
    a_shape: tuple[int, int],
    ratios: list[tuple[int, int]],
    *,
    tile: int,
    leading: int,
    local: int,
) -> Pattern:
    """Sizes tried one by one while they read no more than the A-shape; then the nearest output."""

    def cells_of(pattern: Pattern) -> Cells:
        return pattern_cells(text, head, pattern, tile=tile, leading=leading, local=local)

    def lines(columns: int, diagonals: int, size: int) -> Pattern:
        part = size * columns // (columns + diagonals)
        return "lines", part, size - part

    first: Pattern = ("a-shape", *a_shape)
    target = len(cells_of(first))
    families = [[lines(*ratio, size) for size in range(1, text.prompt + 1)] for ratio in ratios]
    families.append([("blocks", size, 0) for size in range(1, text.prompt + 1)])
    offered: list[Pattern] = [first]
    for family in families:
        *_, largest = takewhile(lambda each: len(cells_of(each)) <= target, family)
        offered.append(largest)

    def out(cells: Cells) -> np.ndarray:
        rows = []
        for t in range(text.prompt):
            keys = {s for s in range(t + 1) if (t, s) in cells}
            weights = softmax(plain(text, t, head, keys))
            rows.append(sum(w * text.v[s, head // text.share] for s, w in weights.items()))
        return np.stack(rows)

    exact = out({(t, s) for t in range(text.prompt) for s in range(t + 1)})
    errors = [float(np.abs(out(cells_of(each)) - exact).sum()) for each in offered]
    return offered[errors.index(min(errors))]


def infllm(
    text: Text,
    *,
    initial: int,
    local: int,
    block: int,
    top: int,
    representatives: int,
    chunk: int,
    room: int | None = None,
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
        count = top
        if room is not None:
            end = initial + len(block_keys) * block
            left_over = [len(range(end, t - local + 1)) for t in range(first, last)]
            while count and np.mean(left_over) + count * block > room:
                count -= 1
        chosen.clear()
        chosen.update(best(scores, count))

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
