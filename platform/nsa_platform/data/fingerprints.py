"""Fingerprints of documents that tell copies and near copies: a hash, and a MinHash signature.

Two documents agree in about as many places of their signatures as their sets of token runs have in
common (Jaccard similarity). Documents that agree in a whole band of places are compared, no others.

Source:
    A. Broder, On the resemblance and containment of documents, SEQUENCES 1997; bands as in
    J. Leskovec, A. Rajaraman, J. Ullman, Mining of Massive Datasets, chapter 3.
"""

import hashlib
from collections import defaultdict

import numpy as np

RUN = 5
"""Tokens of a run: what the sets are made of."""
PLACES = 32
"""Of a signature."""
BANDS = 8
SIMILAR = 0.7
"""From this share of equal places on, two documents count as near copies."""

_MIX = np.uint64(0x9E3779B97F4A7C15)
_SEEDS = np.frombuffer(hashlib.shake_256(b"places").digest(PLACES * 8), np.uint64) | np.uint64(1)


def exact_hash(ids: np.ndarray) -> int:
    """A 64-bit hash of token ids: equal documents have equal ones."""
    content = np.ascontiguousarray(ids, dtype="<u4").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def signature(ids: np.ndarray) -> np.ndarray:
    """MinHash signature of token ids, uint32 [PLACES]; a short document is one run."""
    ids = ids.astype(np.uint64)
    count = max(len(ids) - RUN + 1, 1)
    runs = np.zeros(count, np.uint64)
    for offset in range(min(RUN, len(ids))):
        runs = _scrambled(runs ^ (ids[offset : offset + count] + _MIX))
    return np.array([_scrambled(runs * seed).min() >> np.uint64(32) for seed in _SEEDS], np.uint32)


def near_copies(signatures: np.ndarray) -> np.ndarray:
    """For each document [N, PLACES] the first one that it is a near copy of, int64 [N].

    A document without one stands for itself. Copies of copies count as copies of the first.
    """
    parents = np.arange(len(signatures))
    width = PLACES // BANDS
    for band in range(BANDS):
        buckets: dict[bytes, list[int]] = defaultdict(list)
        for number, places in enumerate(signatures[:, band * width : (band + 1) * width]):
            buckets[places.tobytes()].append(number)
        for members in buckets.values():
            first, *others = members
            alike = (signatures[others] == signatures[first]).mean(1) >= SIMILAR
            for other in np.array(others, np.int64)[alike]:
                _join(parents, first, int(other))
    return np.array([_root(parents, number) for number in range(len(parents))], np.int64)


def _scrambled(values: np.ndarray) -> np.ndarray:
    """A mix of all bits (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _root(parents: np.ndarray, number: int) -> int:
    while parents[number] != number:
        parents[number] = parents[parents[number]]
        number = int(parents[number])
    return number


def _join(parents: np.ndarray, one: int, other: int) -> None:
    low, high = sorted((_root(parents, one), _root(parents, other)))
    parents[high] = low
