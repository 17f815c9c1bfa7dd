"""Rows of exactly `context_length` tokens out of documents of any length.

The documents of an epoch form one stream: shards in a permuted order, and in each shard its
documents in a permuted order. Both permutations are arithmetic on (seed, epoch, shard), so row i of
an epoch is the same on every machine, for every number of workers, and can be read on its own.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nsa_platform.data.shards import ShardSet

IGNORED = -100
"""Target of a position that counts for no loss."""
OPEN_ROWS = 1024
"""Whole packing looks for room in this many unfinished rows."""
WINDOW = 1024
"""Whole packing looks at so many documents of the stream at once, the longest first."""
RULES = {"split": "split/1", "whole": "whole/2"}
"""Names of how each kind of packing lays out rows, with a number that grows when that changes: then
a row's number means another row."""
KEPT_ORDERS = 4


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row."""

    ids: np.ndarray
    """int64 [context_length]."""
    targets: np.ndarray
    """int64 [context_length]: the next token of the same document, or IGNORED."""
    starts: np.ndarray
    """int32: where pieces of documents begin; the first is 0."""


@dataclass(frozen=True, slots=True)
class _Segment:
    ids: np.ndarray
    counted: np.ndarray | None
    begins: np.ndarray
    """Where documents begin in this segment; one that goes on from before is not listed."""


class Packer(Protocol):
    """All rows of one epoch."""

    num_rows: int
    truncated_documents: int
    """Documents that were cut to the context length (whole packing only)."""
    truncated_tokens: int
    """Tokens that were left out by cutting."""
    padding_tokens: int
    """Positions of the epoch that hold no token."""

    def row(self, index: int) -> Row:
        """Row `index` of the epoch."""
        ...


class DocumentOrder:
    """The permuted documents of one epoch, read shard by shard."""

    def __init__(self, shards: ShardSet, *, seed: int, epoch: int) -> None:
        self.shards = shards
        self._key = (seed, epoch)
        self.shard_order = permutation(len(shards), *self._key, 0)
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()

    def documents(self, shard: int) -> np.ndarray:
        """The permuted row numbers of one shard."""
        if shard not in self._orders:
            rows = self.shards.manifest.shards[shard].rows
            self._orders[shard] = permutation(rows, *self._key, shard + 1)
            if len(self._orders) > KEPT_ORDERS:
                self._orders.popitem(last=False)
        return self._orders[shard]

    def lengths(self, shard: int) -> np.ndarray:
        """Tokens of each document of one shard, in permuted order."""
        return np.diff(self.shards.open(shard).offsets)[self.documents(shard)]


class SplitPacker:
    """The stream cut every `context_length` tokens.

    Each token of the epoch stands in exactly one row. Documents that do not fit go on in the next
    row; the last token before a cut has its target from beyond the cut. Only the last row of an
    epoch is padded.
    """

    def __init__(self, order: DocumentOrder, *, context_length: int, pad_id: int) -> None:
        self._order = order
        self._length = context_length
        self._pad_id = pad_id
        tokens = [order.shards.manifest.shards[shard].tokens for shard in order.shard_order]
        self._bounds = np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])
        self._total = int(self._bounds[-1])
        self._ends: OrderedDict[int, np.ndarray] = OrderedDict()
        self.num_rows = -(-self._total // context_length)
        self.truncated_documents = 0
        self.truncated_tokens = 0
        self.padding_tokens = self.num_rows * context_length - self._total

    def row(self, index: int) -> Row:
        """Row `index`: tokens [index * context_length, (index + 1) * context_length) and a look."""
        begin = index * self._length
        end = min(begin + self._length + 1, self._total)
        segments: list[_Segment] = []
        place = int(np.searchsorted(self._bounds, begin, side="right")) - 1
        while begin < end:
            stop = min(end, int(self._bounds[place + 1]))
            if stop > begin:
                segments.append(self._read(place, begin, stop))
            begin, place = stop, place + 1
        if place < len(self._order.shards):
            self._order.shards.prefetch(int(self._order.shard_order[place]))
        return _lay_out(segments, self._length, self._pad_id)

    def _read(self, place: int, begin: int, end: int) -> _Segment:
        """Tokens [begin, end) of the epoch, all of them in the shard at `place` of the order."""
        number = int(self._order.shard_order[place])
        shard, documents = self._order.shards.open(number), self._order.documents(number)
        ends = self._document_ends(number)
        begin, end = begin - int(self._bounds[place]), end - int(self._bounds[place])
        first = int(np.searchsorted(ends, begin, side="right"))
        last = int(np.searchsorted(ends, end, side="left")) + 1
        chosen = documents[first:last]
        doc_ends = ends[first:last]
        doc_begins = doc_ends - (shard.offsets[chosen + 1] - shard.offsets[chosen])
        piece_begins = np.maximum(doc_begins, begin)
        lengths = np.minimum(doc_ends, end) - piece_begins
        sources = shard.offsets[chosen] + (piece_begins - doc_begins)
        taken = _gather(sources, lengths)
        return _Segment(
            ids=shard.ids[taken],
            counted=None if shard.loss_mask is None else shard.loss_mask[taken],
            begins=(piece_begins - begin)[(lengths > 0) & (doc_begins >= begin)],
        )

    def _document_ends(self, shard: int) -> np.ndarray:
        if shard not in self._ends:
            self._ends[shard] = np.cumsum(self._order.lengths(shard), dtype=np.int64)
            if len(self._ends) > KEPT_ORDERS:
                self._ends.popitem(last=False)
        return self._ends[shard]


class WholePacker:
    """Whole documents side by side, packed by length; the rest of a row is padding.

    A document longer than a row keeps its first `context_length` tokens; how many were cut is
    counted. The lengths of all documents are read when the epoch begins.
    """

    def __init__(self, order: DocumentOrder, *, context_length: int, pad_id: int) -> None:
        self._order = order
        self._length = context_length
        self._pad_id = pad_id
        per_shard = [order.lengths(int(shard)) for shard in order.shard_order]
        lengths = np.concatenate([np.zeros(0, dtype=np.int64), *per_shard])
        shards = np.repeat(order.shard_order, [len(part) for part in per_shard])
        documents = [order.documents(int(shard)) for shard in order.shard_order]
        kept = np.minimum(lengths, context_length)
        rows = best_fit(kept, context_length)
        by_row = np.argsort(rows, kind="stable")
        self._shards = shards[by_row]
        self._documents = np.concatenate([np.zeros(0, dtype=np.int64), *documents])[by_row]
        self._kept = kept[by_row]
        self.num_rows = int(rows.max()) + 1 if len(rows) else 0
        self._bounds = np.searchsorted(rows[by_row], np.arange(self.num_rows + 1))
        self.truncated_documents = int((lengths > context_length).sum())
        self.truncated_tokens = int((lengths - kept).sum())
        self.padding_tokens = self.num_rows * context_length - int(kept.sum())

    def row(self, index: int) -> Row:
        """Row `index`, its documents in stream order."""
        members = range(self._bounds[index], self._bounds[index + 1])
        segments = [self._read(member) for member in members]
        return _lay_out(segments, self._length, self._pad_id)

    def _read(self, member: int) -> _Segment:
        shard = self._order.shards.open(int(self._shards[member]))
        begin = int(shard.offsets[self._documents[member]])
        taken = slice(begin, begin + int(self._kept[member]))
        return _Segment(
            ids=shard.ids[taken],
            counted=None if shard.loss_mask is None else shard.loss_mask[taken],
            begins=np.zeros(1, dtype=np.int64),
        )


def permutation(count: int, *key: int) -> np.ndarray:
    """A shuffle of range(count) that is the same for a key on every machine and version.

    Source: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) as a hash of key and index.
    """
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in key:
            state = _mix(state ^ np.uint64(part % 2**64))
        ranks = _mix(state + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return np.argsort(ranks, kind="stable")


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each item: of the open rows the one where the least room is left, or a new one.

    Items are looked at WINDOW by WINDOW, the longest of a window first, so that the short ones find
    what is left. Of more than OPEN_ROWS open rows the fullest is closed. Rows are numbered by their
    first item.

    Args:
        lengths: int64, none above capacity.

    Source:
        Best-fit decreasing, Johnson et al., SIAM J. Comput. 3 (1974), within windows.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    # (room, row), ascending.
    open_rows: list[tuple[int, int]] = []
    count = 0
    for begin in range(0, len(lengths), WINDOW):
        longest_first = np.argsort(-lengths[begin : begin + WINDOW], kind="stable") + begin
        for index in longest_first.tolist():
            length = int(lengths[index])
            place = bisect_left(open_rows, (length, -1))
            if place < len(open_rows):
                room, row = open_rows.pop(place)
            else:
                room, row, count = capacity, count, count + 1
            rows[index] = row
            if room > length:
                insort(open_rows, (room - length, row))
            if len(open_rows) > OPEN_ROWS:
                del open_rows[0]
    _, first_items = np.unique(rows, return_index=True)
    return np.argsort(np.argsort(first_items))[rows]


def _mix(value: np.ndarray | np.uint64) -> np.ndarray:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value ^ (value >> np.uint64(31)))


def _gather(sources: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices [source, source + length) of all pieces, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(sources - before, lengths) + np.arange(int(lengths.sum()))


def _lay_out(segments: list[_Segment], length: int, pad_id: int) -> Row:
    """Put segments into one row; they may hold one token more, whose only use is as a target."""
    sizes = np.array([len(segment.ids) for segment in segments])
    total = int(sizes.sum())
    filled = min(total, length)
    ids = np.full(max(total, length), pad_id, dtype=np.int64)
    targets = np.full(length, IGNORED, dtype=np.int64)
    if not segments:
        return Row(ids, targets, np.zeros(1, dtype=np.int32))
    ids[:total] = np.concatenate([segment.ids for segment in segments])
    before = np.cumsum(sizes) - sizes
    pairs = zip(segments, before, strict=True)
    begins = np.concatenate([segment.begins + offset for segment, offset in pairs])
    has_target = np.ones(total, dtype=bool)
    has_target[begins] = False
    for segment, offset in zip(segments, before, strict=True):
        if segment.counted is not None:
            has_target[offset : offset + len(segment.ids)] &= segment.counted
    known = min(total - 1, length)
    targets[:known] = np.where(has_target[1 : known + 1], ids[1 : known + 1], IGNORED)
    marks = np.zeros(length, dtype=bool)
    marks[0] = True
    marks[begins[begins < length]] = True
    if filled < length:
        marks[filled] = True
    return Row(ids[:length], targets, np.flatnonzero(marks).astype(np.int32))
