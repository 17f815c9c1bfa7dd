"""What is in prepared shards: lengths, tokens, copies, and held-out rows that are trained on.

A shard is the unit of work; what all shards say is put together at the end.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from nsa_platform.data.each import Each
from nsa_platform.data.fingerprints import exact_hash, near_copies, signature
from nsa_platform.data.shards import ShardSet

PERCENTILES = (5, 25, 50, 75, 95, 99)
LONG = (8192, 32768, 65536)
"""Lengths in tokens from which on documents teach a context of that length."""


@dataclass(frozen=True, slots=True)
class ShardJob:
    """A shard to look into; the verified file is read by whoever does it."""

    folder: str
    cache_dir: str | None
    index: int


@dataclass(frozen=True, slots=True)
class ShardContent:
    """One shard."""

    index: int
    lengths: np.ndarray
    """int64 [documents], in tokens."""
    hashes: np.ndarray
    """uint64 [documents]."""
    signatures: np.ndarray
    """uint32 [documents, PLACES]."""
    counts: np.ndarray
    """int64 [vocabulary], how often each id occurs."""
    loss_tokens: int


def look_into(job: ShardJob) -> ShardContent:
    """Read one shard.

    Raises:
        ShardError: it is missing or is not what the manifest says.
    """
    shards = ShardSet(job.folder, cache_dir=job.cache_dir)
    shard = shards.open(job.index)
    documents = [shard.ids[a:b] for a, b in zip(shard.offsets, shard.offsets[1:], strict=False)]
    vocabulary = shards.manifest.tokenizer.vocab_size
    mask = shard.loss_mask
    return ShardContent(
        index=job.index,
        lengths=np.diff(shard.offsets),
        hashes=np.array([exact_hash(ids) for ids in documents], np.uint64),
        signatures=np.array([signature(ids) for ids in documents], np.uint32),
        counts=np.bincount(shard.ids, minlength=vocabulary).astype(np.int64),
        loss_tokens=len(shard.ids) if mask is None else int(mask.sum()),
    )


@dataclass(frozen=True, slots=True)
class Content:
    """A whole split, its documents in the order of the shards."""

    lengths: np.ndarray
    hashes: np.ndarray
    signatures: np.ndarray
    counts: np.ndarray
    loss_tokens: int


def inspect(shards: ShardSet, cache_dir: str | None, *, each: Each) -> Content:
    """Look into every shard of a split.

    Raises:
        ShardError: one is missing or is not what the manifest says.
    """
    jobs = [ShardJob(shards.folder, cache_dir, index) for index in range(len(shards))]
    found = sorted(each(look_into, jobs), key=lambda content: content.index)
    return Content(
        lengths=np.concatenate([each.lengths for each in found]),
        hashes=np.concatenate([each.hashes for each in found]),
        signatures=np.concatenate([each.signatures for each in found]),
        counts=np.sum([each.counts for each in found], axis=0),
        loss_tokens=sum(each.loss_tokens for each in found),
    )


def statistics(content: Content) -> dict[str, Any]:
    """Documents, tokens, their lengths; how much of the vocabulary is in use, and its entropy."""
    lengths, counts = content.lengths, content.counts
    tokens = int(lengths.sum())
    frequency = counts[counts > 0] / max(tokens, 1)
    return {
        "documents": len(lengths),
        "tokens": tokens,
        "loss_tokens": content.loss_tokens,
        "length_percentiles": {
            str(p): int(value)
            for p, value in zip(PERCENTILES, np.percentile(lengths, PERCENTILES), strict=True)
        },
        "longest": int(lengths.max()),
        "share_of_tokens_in_documents_of": {
            str(length): float(lengths[lengths >= length].sum() / max(tokens, 1)) for length in LONG
        },
        "vocabulary_in_use": float((counts > 0).mean()),
        "bits_per_token": float(-(frequency * np.log2(frequency)).sum()),
        "most_frequent_ids": np.argsort(-counts, kind="stable")[:10].tolist(),
    }


def copies(content: Content) -> dict[str, Any]:
    """Documents, and their tokens, that are copies or near copies of an earlier one."""
    _, firsts = np.unique(content.hashes, return_index=True)
    exact = np.ones(len(content.hashes), bool)
    exact[firsts] = False
    near = (near_copies(content.signatures) != np.arange(len(exact))) & ~exact
    return {"exact": _size(content, exact), "near": _size(content, near)}


def leaked(train: Content, held_out: Content) -> dict[str, Any]:
    """Held-out documents that are copies or near copies of one that is trained on."""
    exact = np.isin(held_out.hashes, train.hashes)
    firsts = near_copies(np.concatenate([train.signatures, held_out.signatures]))
    near = (firsts[len(train.hashes) :] < len(train.hashes)) & ~exact
    return {"exact": _size(held_out, exact), "near": _size(held_out, near)}


def _size(content: Content, chosen: np.ndarray) -> dict[str, Any]:
    tokens = int(content.lengths[chosen].sum())
    return {
        "documents": int(chosen.sum()),
        "tokens": tokens,
        "share_of_tokens": tokens / max(int(content.lengths.sum()), 1),
    }
