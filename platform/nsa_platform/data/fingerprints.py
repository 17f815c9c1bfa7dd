"""Fingerprints of documents that tell copies and near copies: hashes, and a MinHash signature.

Two documents agree in about as many places of their signatures as their sets of token runs have in
common (Jaccard similarity). Documents that agree in a whole band of places are compared, no others.

Source:
    A. Broder, On the resemblance and containment of documents, SEQUENCES 1997; bands as in
    J. Leskovec, A. Rajaraman, J. Ullman, Mining of Massive Datasets, chapter 3.
"""

import hashlib
import unicodedata
from collections.abc import Iterable

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

RUN = 5
"""Tokens of a run: what the sets are made of."""
PLACES = 128
"""Of a signature."""
BANDS = 16
"""With eight places each, pairs of similarity s are compared with probability 1 - (1 - s^8)^16."""
SIMILAR = 0.8
"""From this share of equal places on, inspection counts two documents as near copies."""
CHUNK = 512
"""Runs that are hashed for all places at once: half a megabyte, which a core's cache holds."""
KINDS = 256
"""Sets of likes that are told apart among documents that agree in a band."""

_MIX = np.uint64(0x9E3779B97F4A7C15)
_SEEDS = np.frombuffer(hashlib.shake_256(b"places").digest(PLACES * 8), np.uint64) | np.uint64(1)


def exact_hash(ids: np.ndarray) -> int:
    """A 64-bit hash of token ids: equal documents have equal ones."""
    return _hash(np.ascontiguousarray(ids, dtype="<u4").tobytes())


def text_hash(texts: Iterable[str]) -> int:
    """A 64-bit hash of texts in their order, whatever their white space and Unicode's spelling."""
    normal = (" ".join(unicodedata.normalize("NFKC", text).split()) for text in texts)
    return _hash("\n".join(normal).encode("utf-8", "surrogatepass"))


def signature(ids: np.ndarray) -> np.ndarray:
    """MinHash signature of token ids, uint32 [PLACES]; a short document is one run."""
    ids = ids.astype(np.uint64)
    count = max(len(ids) - RUN + 1, 1)
    runs = np.zeros(count, np.uint64)
    for offset in range(min(RUN, len(ids))):
        runs = _scrambled(runs ^ (ids[offset : offset + count] + _MIX))
    least = [
        _scrambled(runs[start : start + CHUNK] * _SEEDS[:, None]).min(1)
        for start in range(0, count, CHUNK)
    ]
    return (np.min(least, axis=0) >> np.uint64(32)).astype(np.uint32)


def band_keys(signatures: np.ndarray) -> np.ndarray:
    """What documents that agree in a band have in common, uint64 [BANDS, N], of uint32 [N, PLACES].

    Others share a key by accident alone, and comparing them tells so.
    """
    keys = np.zeros((BANDS, len(signatures)), np.uint64)
    for places in signatures.reshape(len(signatures), BANDS, -1).transpose(2, 1, 0):
        keys = _scrambled(keys ^ (places.astype(np.uint64) + _MIX))
    return keys


def equal(keys: np.ndarray) -> np.ndarray:
    """Pairs of neighbours among the documents that share a key [N], int64 [pairs, 2]."""
    order = np.argsort(keys, kind="stable")
    same = keys[order[1:]] == keys[order[:-1]]
    return np.stack([order[:-1][same], order[1:][same]], 1)


def buckets(keys: np.ndarray) -> list[np.ndarray]:
    """The documents that share a key [N] with another one, by key: int64 arrays, ascending."""
    shared = np.unique(equal(keys))
    order = shared[np.argsort(keys[shared], kind="stable")]
    edges = np.flatnonzero(np.diff(keys[order])) + 1
    return np.split(order, edges) if len(order) else []


def alike(signatures: np.ndarray, similarity: float) -> np.ndarray:
    """Pairs of rows [N, PLACES] with at least that share of equal places, int64 [pairs, 2].

    They are enough to tell who hangs together: a row is compared with the first of its likes. After
    KINDS sets of likes the rest is not compared, for time.
    """
    pairs: list[np.ndarray] = []
    left = np.arange(len(signatures))
    while len(left) > 1 and len(pairs) < KINDS:
        first, others = left[0], left[1:]
        same = (signatures[others] == signatures[first]).mean(1) >= similarity
        pairs.append(np.stack([np.full(same.sum(), first), others[same]], 1))
        left = others[~same]
    return np.concatenate([np.zeros((0, 2), np.int64), *pairs])


def joined(firsts: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """For each document the first one that it hangs together with, int64 [N].

    Args:
        firsts: the same before the pairs [pairs, 2] were known.
    """
    count = len(firsts)
    rows = np.concatenate([np.arange(count), pairs[:, 0]])
    columns = np.concatenate([firsts, pairs[:, 1]])
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    _, leaders = np.unique(labels, return_index=True)
    return leaders[labels]


def near_copies(signatures: np.ndarray) -> np.ndarray:
    """For each document [N, PLACES] the first one that it is a near copy of, int64 [N].

    A document without one stands for itself. Copies of copies count as copies of the first.
    """
    pairs = [
        members[alike(signatures[members], SIMILAR)]
        for keys in band_keys(signatures)
        for members in buckets(keys)
    ]
    return joined(np.arange(len(signatures)), np.concatenate([np.zeros((0, 2), np.int64), *pairs]))


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def _scrambled(values: np.ndarray) -> np.ndarray:
    """A mix of all bits (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
