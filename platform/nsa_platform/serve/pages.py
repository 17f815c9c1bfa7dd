"""Page accounting: which physical pages hold which tokens of which sequence. No tensors.

A sequence has two rows of pages. Its `pages` hold every token, for as long as it lives. Its
`window_pages` hold the last `tail_tokens` tokens; older ones are given back and leave -1 behind.

Prefix cache: a page whose contents are final is named after them (page_keys.py), and a sequence
that begins with the same tokens holds the same page instead of computing it. A sequence can go on
behind the first `a` pages if all of these are known in the first pool, and those of the last
tail_tokens before the boundary in the window pool. The window pool is small, so pages that merely
pass through a window are the first to be forgotten. Pages before a boundary that a later request is
likely to go on from (an anchor) stay: the end of a prompt, the end of a sequence, and the place
where a request was seen to part from what is known in the first pool.

A page that several hold is never written: writes to a sequence's first num_shared pages go to
scratch. They would write what stands there, for the tokens are the same.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from nsa_platform.serve.page_keys import PageKeys
from nsa_platform.serve.page_pool import OutOfPages, PageLeak, PagePool

ABSENT = -1


def _row() -> "array[int]":
    # 32-bit integers side by side: a step copies them whole, however long the context is.
    return array("i")


@dataclass(slots=True)
class SequencePages:
    """The pages of one sequence, in the order of its tokens."""

    num_tokens: int = 0
    """Tokens that have a place, the ones of the step at hand included."""
    pages: "array[int]" = field(default_factory=_row)
    window_pages: "array[int]" = field(default_factory=_row)
    """As long as `pages`; ABSENT where a page has left the window. Empty without a window pool."""
    num_left: int = 0
    """How many of the first window pages have left."""
    num_shared: int = 0
    """How many of the first pages were found, not computed: they are not written."""
    num_named: int = 0
    """How many of the first pages have been offered to the prefix cache."""
    anchors: set[int] = field(default_factory=set)
    """Numbers of first pages behind which others are likely to go on."""


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """What is known of a new sequence's first tokens."""

    num_pages: int
    """First pages that are known well enough to go on behind them."""
    num_parting: int
    """First pages known in the first pool alone: where the sequence parts from all others."""


class PageBook:
    """Gives sequences the pages that their tokens need, and takes back what left the window."""

    def __init__(
        self,
        *,
        page_size: int,
        num_pages: int,
        tail_tokens: int,
        num_window_pages: int | None,
        enable_prefix_caching: bool = False,
        lookahead: int = 0,
    ) -> None:
        """tail_tokens: how many of the last tokens keep their window page.

        num_window_pages None: there is no window pool (full attention). lookahead: tokens behind a
        page that its contents hang on too.
        """
        self.page_size = page_size
        self.tail_tokens = tail_tokens
        self.enable_prefix_caching = enable_prefix_caching
        self.lookahead = lookahead
        self.pool = PagePool(num_pages)
        self.window_pool = None if num_window_pages is None else PagePool(num_window_pages)

    @property
    def num_pages(self) -> int:
        """Pages that sequences can have, scratch not counted."""
        return self.pool.num_pages - 1

    @property
    def num_free_pages(self) -> int:
        return self.pool.num_free

    def keys(self, token_ids: Iterable[int], salt: str | None = None) -> PageKeys:
        """Names for the pages of a sequence that begins with these tokens."""
        return PageKeys(token_ids, page_size=self.page_size, lookahead=self.lookahead, salt=salt)

    def match(self, keys: PageKeys) -> PrefixHit:
        """What is known of a sequence of which at least the last token is to be computed."""
        if not self.enable_prefix_caching:
            return PrefixHit(0, 0)
        most = max(0, keys.num_tokens - max(1, self.lookahead)) // self.page_size
        num_parting = 0
        while num_parting < most and self.pool.find(keys.key(num_parting)) is not None:
            num_parting += 1
        num_pages = num_parting
        if self.window_pool is not None:
            num_pages = self._whole_tail(keys, num_parting)
        return PrefixHit(num_pages, num_parting)

    def num_known(self, keys: PageKeys) -> int:
        """First tokens of a sequence that need not be computed, as things are now."""
        return self.match(keys).num_pages * self.page_size

    def missing_after(self, hit: PrefixHit, keys: PageKeys) -> int:
        """Free pages that a sequence with these tokens takes: new ones, and cached ones."""
        found = [self.pool.find(keys.key(page)) for page in range(hit.num_pages)]
        num_used = sum(page is not None and self.pool.is_used(page) for page in found)
        return self._num_pages(keys.num_tokens) - num_used

    def attach(self, sequence: SequencePages, keys: PageKeys, hit: PrefixHit) -> None:
        """Let an empty sequence begin with the pages of a hit that was just found."""
        assert not sequence.pages
        first_kept = self._first_of_tail(hit.num_pages)
        for page in range(hit.num_pages):
            sequence.pages.append(self._held(self.pool, keys.key(page)))
            if self.window_pool is not None:
                sequence.window_pages.append(
                    ABSENT
                    if page < first_kept
                    else self._held(self.window_pool, keys.window_key(page))
                )
        sequence.num_left = first_kept if self.window_pool is not None else 0
        sequence.num_tokens = hit.num_pages * self.page_size
        sequence.num_shared = sequence.num_named = hit.num_pages
        sequence.anchors = {hit.num_parting, self._num_final(keys.num_tokens)}

    def room(self, sequence: SequencePages) -> int:
        """How many tokens more the sequence can be given now."""
        num_pages = len(sequence.pages) + self.pool.num_free
        if self.window_pool is not None:
            num_free = self.window_pool.num_free + self._num_leaving(sequence)
            num_pages = min(num_pages, len(sequence.window_pages) + num_free)
        return num_pages * self.page_size - sequence.num_tokens

    def missing(self, sequence: SequencePages, num_new_tokens: int) -> int:
        """Pages that the sequence's next tokens need beside those that it has."""
        return self._num_pages(sequence.num_tokens + num_new_tokens) - len(sequence.pages)

    def extend(
        self, sequence: SequencePages, num_new_tokens: int, keys: PageKeys | None = None
    ) -> None:
        """Make room for the next tokens of a sequence, as extend_all does.

        keys: as long as all pages so far are shared ones, further ones that are known are shared
        too. Their tokens are computed all the same, for the window.
        """
        if keys is not None:
            self._share(sequence, num_new_tokens, keys)
        self.extend_all([sequence], [num_new_tokens])

    def extend_all(self, sequences: Sequence[SequencePages], num_new: Sequence[int]) -> None:
        """Make room for the next tokens of several different sequences, or of none of them.

        Window pages that the next tokens do not reach any more are given back first.

        Raises:
            ValueError: a number of new tokens is not positive.
            OutOfPages: a pool is exhausted; the sequences are as they were.
        """
        if min(num_new) < 1:
            raise ValueError(f"num_new_tokens={min(num_new)} must be positive")
        wanted = [s.num_tokens + n for s, n in zip(sequences, num_new, strict=True)]
        ends = [self._num_pages(num_tokens) for num_tokens in wanted]
        self._check_free(sequences, ends)
        for sequence in sequences:
            self.trim(sequence)
        for sequence, num_tokens, end in zip(sequences, wanted, ends, strict=True):
            sequence.num_tokens = num_tokens
            sequence.pages.extend(self.pool.allocate(end - len(sequence.pages)))
            if self.window_pool is not None:
                count = end - len(sequence.window_pages)
                sequence.window_pages.extend(self.window_pool.allocate(count))

    def trim(self, sequence: SequencePages) -> None:
        """Give back the window pages that no later token reaches. extend does it too."""
        if self.window_pool is None:
            return
        kept_from = self._kept_from(sequence)
        if kept_from > sequence.num_left:
            leaving = range(sequence.num_left, kept_from)
            self._release_window(sequence, leaving)
            for page in leaving:
                sequence.window_pages[page] = ABSENT
            sequence.num_left = kept_from

    def publish(self, sequence: SequencePages, keys: PageKeys) -> None:
        """Name the pages whose contents have become final. Their tokens have been computed."""
        if not self.enable_prefix_caching:
            return
        num_final = self._num_final(min(sequence.num_tokens, keys.num_tokens))
        for page in range(sequence.num_named, num_final):
            self.pool.name(sequence.pages[page], keys.key(page))
            if self.window_pool is not None and sequence.window_pages[page] != ABSENT:
                self.window_pool.name(sequence.window_pages[page], keys.window_key(page))
        sequence.num_named = max(sequence.num_named, num_final)

    def release(self, sequence: SequencePages) -> None:
        """Give back all pages of a sequence; it is empty afterwards."""
        # The last page first: what many sequences share, the beginning, is forgotten last.
        self.pool.release(reversed(sequence.pages))
        if self.window_pool is not None:
            sequence.anchors.add(sequence.num_named)
            kept = range(sequence.num_left, len(sequence.window_pages))
            self._release_window(sequence, reversed(kept))
        sequence.pages, sequence.window_pages, sequence.anchors = _row(), _row(), set()
        sequence.num_tokens = sequence.num_left = sequence.num_shared = sequence.num_named = 0

    def forget(self) -> None:
        """Empty the prefix cache. Sequences keep what they hold."""
        self.pool.forget()
        if self.window_pool is not None:
            self.window_pool.forget()

    def check(self, sequences: Iterable[SequencePages]) -> None:
        """Prove that these sequences hold every page in use, and none too few.

        Raises:
            PageLeak: they do not.
        """
        sequences = list(sequences)
        self.pool.check(page for sequence in sequences for page in sequence.pages)
        if self.window_pool is not None:
            self.window_pool.check(p for s in sequences for p in s.window_pages if p != ABSENT)
        for sequence in sequences:
            self._check_sequence(sequence)

    def _check_sequence(self, sequence: SequencePages) -> None:
        if len(sequence.pages) != len(set(sequence.pages)):
            raise PageLeak("a sequence holds a page twice")
        if len(sequence.pages) != self._num_pages(sequence.num_tokens):
            raise PageLeak(f"{len(sequence.pages)} pages for {sequence.num_tokens} tokens")
        num_final = max(sequence.num_shared, sequence.num_named)
        if any(self.pool.is_shared(page) for page in sequence.pages[num_final:]):
            raise PageLeak("a page that is still written has several holders")
        if self.window_pool is None:
            if sequence.window_pages:
                raise PageLeak("window pages without a window pool")
        elif len(sequence.window_pages) != len(sequence.pages):
            raise PageLeak(f"{len(sequence.window_pages)} of {len(sequence.pages)} window pages")
        elif ABSENT in sequence.window_pages[self._first_seen(sequence) :]:
            raise PageLeak(f"a page of the last {self.tail_tokens} tokens has left the window")

    def _check_free(self, sequences: Sequence[SequencePages], ends: Sequence[int]) -> None:
        """Raise OutOfPages unless all sequences can grow to so many pages."""
        count = sum(end - len(s.pages) for s, end in zip(sequences, ends, strict=True))
        if count > self.pool.num_free:
            raise OutOfPages(f"{count} pages are needed; free: {self.pool.num_free}")
        if self.window_pool is None:
            return
        count = sum(end - len(s.window_pages) for s, end in zip(sequences, ends, strict=True))
        leaving = sum(self._num_leaving(sequence) for sequence in sequences)
        if count > self.window_pool.num_free + leaving:
            raise OutOfPages(
                f"{count} pages of the window pool are needed; "
                f"free: {self.window_pool.num_free + leaving}"
            )

    def _share(self, sequence: SequencePages, num_new_tokens: int, keys: PageKeys) -> None:
        """Hold the known ones of the pages that the next tokens need."""
        end = self._num_pages(sequence.num_tokens + num_new_tokens)
        most = min(end, self._num_final(keys.num_tokens))
        while sequence.num_shared == len(sequence.pages) < most:
            page = self.pool.find(keys.key(sequence.num_shared))
            if page is None:
                return
            self.pool.hold(page)
            sequence.pages.append(page)
            sequence.num_shared += 1

    def _held(self, pool: PagePool, key: bytes) -> int:
        page = pool.find(key)
        assert page is not None
        pool.hold(page)
        return page

    def _whole_tail(self, keys: PageKeys, num_known: int) -> int:
        """The longest beginning of at most num_known pages whose tail the window pool knows."""
        assert self.window_pool is not None
        end = num_known
        first = page = end
        while end:
            first = self._first_of_tail(end)
            while page > first and self.window_pool.find(keys.window_key(page - 1)) is not None:
                page -= 1
            if page <= first:
                return end
            end = page = page - 1
        return 0

    def _release_window(self, sequence: SequencePages, pages: Iterable[int]) -> None:
        assert self.window_pool is not None
        anchored = {
            page
            for anchor in sequence.anchors
            for page in range(self._first_of_tail(anchor), anchor)
        }
        for page in pages:
            physical = sequence.window_pages[page]
            self.window_pool.release([physical], is_passing=page not in anchored)

    def _num_leaving(self, sequence: SequencePages) -> int:
        """Window pages that trim would make free."""
        assert self.window_pool is not None
        leaving = sequence.window_pages[sequence.num_left : self._kept_from(sequence)]
        return sum(not self.window_pool.is_shared(page) for page in leaving)

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _num_final(self, num_tokens: int) -> int:
        """How many first pages nothing can change any more once so many tokens are computed."""
        return max(0, num_tokens - self.lookahead) // self.page_size

    def _first_of_tail(self, boundary: int) -> int:
        """First page with one of the last tail_tokens tokens of the first `boundary` pages."""
        return max(0, boundary * self.page_size - self.tail_tokens) // self.page_size

    def _kept_from(self, sequence: SequencePages) -> int:
        """First logical page that the window still needs.

        The next token sees the last tail_tokens ones; whoever goes on behind the last final page,
        this sequence after a preemption or another one, sees those before that boundary.
        """
        first = self._first_seen(sequence)
        if self.enable_prefix_caching:
            first = min(first, self._first_of_tail(self._num_final(sequence.num_tokens)))
        return first

    def _first_seen(self, sequence: SequencePages) -> int:
        """First logical page with one of the last tail_tokens tokens."""
        return max(0, sequence.num_tokens - self.tail_tokens) // self.page_size
