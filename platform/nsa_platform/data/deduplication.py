"""Copies among tokenised parts: which documents hang together, and the records without the others.

Tasks look at one band each, large corpora in several shares of its keys, so a task holds at most
SHARE documents' keys and signatures (about 1.3 GB). The driver holds 8 bytes of each document and
the pairs. What is kept depends on the corpus alone, not on how many tasks there are.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nsa_platform.config.data import DeduplicateConfig
from nsa_platform.data.each import Each
from nsa_platform.data.fingerprints import BANDS, PLACES, alike, buckets, equal, joined
from nsa_platform.data.parts import SPLITS, PartRecord, SplitRecord
from nsa_platform.data.plan import Progress, Report
from nsa_platform.data.prints import read_keys, read_signatures

SHARE = 8_000_000


@dataclass(frozen=True, slots=True)
class PairJob:
    """Find pairs among the documents of one share of one row of keys."""

    staging: str
    parts: tuple[tuple[str, int], ...]
    """Fingerprint of each part, and its documents."""
    row: int
    """0: the texts' hashes; 1 + b: band b."""
    share: int
    shares: int
    similarity: float


@dataclass(slots=True)
class SourceCopies:
    """What one input of the corpus held, and what was left out of it."""

    documents: int = 0
    tokens: int = 0
    copies: int = 0
    near_copies: int = 0
    tokens_left: int = 0
    """Tokens of the documents that stay."""


def find_pairs(job: PairJob) -> np.ndarray:
    """Documents of a share that are copies, enough pairs to join them, int64 [pairs, 2].

    Raises:
        StorageError: the store cannot be reached.
    """
    numbers, keys = _share(job)
    if job.row == 0:
        return numbers[equal(keys)]
    groups = [numbers[members] for members in buckets(keys)]
    candidates = np.unique(np.concatenate([np.zeros(0, np.int64), *groups]))
    signatures = _signatures(job, candidates)
    pairs = [
        members[alike(signatures[np.searchsorted(candidates, members)], job.similarity)]
        for members in groups
    ]
    return np.concatenate([np.zeros((0, 2), np.int64), *pairs])


def without_copies(
    staging: str,
    records: Sequence[PartRecord],
    config: DeduplicateConfig,
    *,
    each: Each,
    report: Report,
) -> tuple[list[PartRecord], dict[int, SourceCopies]]:
    """The records of all parts, in order, less all copies but the first; and counts by input.

    Raises:
        StorageError: the store cannot be reached.
    """
    counts = [record.documents for record in records]
    exact, jobs = np.arange(sum(counts)), _jobs(staging, records, config)
    told = _Told(report, len(jobs))
    rows = [[job for job in jobs if (job.row == 0) == is_exact] for is_exact in (True, False)]
    exact = _join(exact, told.counted(each(find_pairs, rows[0])))
    near = _join(exact, told.counted(each(find_pairs, rows[1]))) if rows[1] else exact
    itself = np.arange(len(exact))
    ends = np.cumsum(counts)[:-1]
    marks = np.where(exact != itself, 1, np.where(near != itself, 2, 0))
    sources: dict[int, SourceCopies] = {}
    left = [
        _thinned(record, marks, sources)
        for record, marks in zip(records, np.split(marks, ends), strict=True)
    ]
    return left, sources


class _Told:
    """Reports how many of the jobs are done."""

    def __init__(self, report: Report, total: int) -> None:
        self._report, self._done, self._total = report, 0, total
        self._show()

    def counted(self, results: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for result in results:
            self._done += 1
            self._show()
            yield result

    def _show(self) -> None:
        self._report(Progress("finding copies", self._done, self._total, "tasks"))


def _jobs(staging: str, records: Sequence[PartRecord], config: DeduplicateConfig) -> list[PairJob]:
    parts = tuple((record.fingerprint, record.documents) for record in records)
    shares = max(-(-sum(count for _, count in parts) // SHARE), 1)
    similarity = config.near_similarity
    return [
        PairJob(staging, parts, row, share, shares, similarity or 1.0)
        for row in range(1 if similarity is None else 1 + BANDS)
        for share in range(shares)
    ]


def _join(firsts: np.ndarray, found: Iterator[np.ndarray]) -> np.ndarray:
    """The first of each set of documents, with the pairs in it; joined now and then, for memory."""
    waiting: list[np.ndarray] = []
    for pairs in found:
        waiting.append(pairs)
        if sum(map(len, waiting)) > len(firsts):
            firsts, waiting = joined(firsts, np.concatenate(waiting)), []
    return joined(firsts, np.concatenate(waiting)) if waiting else firsts


def _share(job: PairJob) -> tuple[np.ndarray, np.ndarray]:
    """Numbers in the corpus and keys of the documents of a share."""
    numbers, keys, before = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)], 0
    for fingerprint, count in job.parts:
        row = read_keys(job.staging, fingerprint, job.row, count)
        mine = np.flatnonzero(row % np.uint64(job.shares) == job.share)
        numbers.append(mine + before)
        keys.append(row[mine])
        before += count
    return np.concatenate(numbers), np.concatenate(keys)


def _signatures(job: PairJob, documents: np.ndarray) -> np.ndarray:
    """Of documents by their numbers in the corpus, ascending; uint8 [documents, PLACES]."""
    found, before = [np.zeros((0, PLACES), np.uint8)], 0
    for fingerprint, count in job.parts:
        begin, end = np.searchsorted(documents, [before, before + count])
        if begin < end:
            rows = documents[begin:end] - before
            found.append(read_signatures(job.staging, fingerprint)[rows])
        before += count
    return np.concatenate(found)


def _thinned(record: PartRecord, marks: np.ndarray, sources: dict[int, SourceCopies]) -> PartRecord:
    """A record of the documents that are marked 0; 1 and 2 are copies and near copies."""
    prints, stays = record.prints, marks == 0
    assert prints is not None
    lengths = np.zeros(len(marks), np.int64)
    splits: dict[str, SplitRecord] = {}
    for split in SPLITS:
        chosen = prints.held_out == (split == "validation")
        lengths[chosen] = record.splits[split].lengths
        rows = np.flatnonzero(stays[chosen])
        splits[split] = SplitRecord(
            lengths=record.splits[split].lengths[rows],
            text_bytes=int(prints.text_bytes[chosen & stays].sum()),
            loss_tokens=int(prints.loss_tokens[chosen & stays].sum()),
            rows=rows,
        )
    for number in np.unique(prints.inputs):
        mine = prints.inputs == number
        source = sources.setdefault(int(number), SourceCopies())
        source.documents += int(mine.sum())
        source.tokens += int(lengths[mine].sum())
        source.copies += int((marks[mine] == 1).sum())
        source.near_copies += int((marks[mine] == 2).sum())
        source.tokens_left += int(lengths[mine & stays].sum())
    reasons = {"copy": int((marks == 1).sum()), "near_copy": int((marks == 2).sum())}
    skipped = record.skipped + Counter({name: n for name, n in reasons.items() if n})
    return replace(record, splits=splits, skipped=skipped)
