"""Page accounting: which physical pages hold which tokens of which sequence. No tensors.

A sequence has two rows of pages. Its `pages` hold every token, for as long as it lives. Its
`window_pages` hold the last `tail_tokens` tokens; older ones are given back and leave -1 behind.

Physical page 0 of each pool is scratch and is never handed out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

ABSENT = -1


class OutOfPages(RuntimeError):
    """A pool has fewer free pages than were asked for. Nothing was taken."""


class PageLeak(RuntimeError):
    """Pages in use, pages held and free pages do not add up: a bug of the accounting."""


class PageAllocator:
    """The free pages of one pool; the page that was given back last goes out first."""

    def __init__(self, num_pages: int) -> None:
        """num_pages counts the scratch page 0 too."""
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages} must be at least 2: page 0 is scratch")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages. Raises OutOfPages and takes none if there are fewer."""
        if count > len(self._free):
            raise OutOfPages(
                f"{count} pages are needed and {len(self._free)} of {self.num_pages - 1} are free"
            )
        taken = [self._free.pop() for _ in range(count)]
        self._used.update(taken)
        return taken

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back. Raises ValueError for a page that is not in use."""
        for page in pages:
            if page not in self._used:
                raise ValueError(f"page {page} is given back but is not in use")
            self._used.remove(page)
            self._free.append(page)

    @property
    def num_used(self) -> int:
        return len(self._used)

    def in_use(self) -> frozenset[int]:
        """The pages that were handed out."""
        return frozenset(self._used)

    def check(self, held: Sequence[int]) -> None:
        """Raise PageLeak unless `held` are the pages in use, each once, and the rest is free."""
        if len(held) != len(set(held)):
            raise PageLeak(f"{len(held) - len(set(held))} pages are held twice")
        if set(held) != self._used:
            lost, foreign = sorted(self._used - set(held)), sorted(set(held) - self._used)
            raise PageLeak(
                f"pages in use that nobody holds: {lost}; held but not in use: {foreign}"
            )
        if set(self._free) | self._used != set(range(1, self.num_pages)) or (
            len(self._free) + len(self._used) != self.num_pages - 1
        ):
            raise PageLeak(
                f"{len(self._free)} free and {len(self._used)} used pages are not the "
                f"{self.num_pages - 1} of the pool"
            )


@dataclass(slots=True)
class SequencePages:
    """The pages of one sequence, in the order of its tokens."""

    num_tokens: int = 0
    """Tokens that have a place, the ones of the step at hand included."""
    pages: list[int] = field(default_factory=list)
    window_pages: list[int] = field(default_factory=list)
    """As long as `pages`; ABSENT where a page has left the window. Empty without a window pool."""
    num_left: int = 0
    """How many of the first window pages have left."""


class PageBook:
    """Gives sequences the pages that their tokens need, and takes back what left the window."""

    def __init__(
        self, *, page_size: int, num_pages: int, tail_tokens: int, num_window_pages: int | None
    ) -> None:
        """tail_tokens: how many of the last tokens keep their window page.

        num_window_pages None: there is no window pool (full attention).
        """
        self.page_size = page_size
        self.tail_tokens = tail_tokens
        self.allocator = PageAllocator(num_pages)
        self.window_allocator = (
            None if num_window_pages is None else PageAllocator(num_window_pages)
        )

    @property
    def num_pages(self) -> int:
        """Pages that sequences can have, scratch not counted."""
        return self.allocator.num_pages - 1

    @property
    def num_free_pages(self) -> int:
        return self.allocator.num_free

    def room(self, sequence: SequencePages) -> int:
        """How many tokens more the sequence can be given now."""
        num_free = self.allocator.num_free
        if self.window_allocator is not None:
            leaving = self._kept_from(sequence) - sequence.num_left
            num_free = min(num_free, self.window_allocator.num_free + leaving)
        return (len(sequence.pages) + num_free) * self.page_size - sequence.num_tokens

    def can_extend(self, sequence: SequencePages, num_new_tokens: int) -> bool:
        """Whether extend would find the pages."""
        return num_new_tokens <= self.room(sequence)

    def missing(self, sequence: SequencePages, num_new_tokens: int) -> int:
        """Pages that the sequence's next tokens need beside those that it has."""
        needed = -(-(sequence.num_tokens + num_new_tokens) // self.page_size)
        return needed - len(sequence.pages)

    def extend(self, sequence: SequencePages, num_new_tokens: int) -> None:
        """Make room for the next tokens of a sequence, as extend_all does."""
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
        counts = [self.missing(s, n) for s, n in zip(sequences, num_new, strict=True)]
        window, num_free = self.window_allocator, self.allocator.num_free
        num_free_window = num_free if window is None else window.num_free
        leaving = sum(self._kept_from(sequence) - sequence.num_left for sequence in sequences)
        if sum(counts) > min(num_free, num_free_window + leaving):
            raise OutOfPages(
                f"{sum(counts)} pages are needed; free: {num_free}, "
                f"in the window pool: {'none' if window is None else num_free_window}"
            )
        for sequence in sequences:
            self.trim(sequence)
        for sequence, count, tokens in zip(sequences, counts, num_new, strict=True):
            if window is not None:
                sequence.window_pages += window.allocate(count)
            sequence.pages += self.allocator.allocate(count)
            sequence.num_tokens += tokens

    def trim(self, sequence: SequencePages) -> None:
        """Give back the window pages that no later token reaches. extend does it too."""
        if self.window_allocator is None:
            return
        kept_from = self._kept_from(sequence)
        leaving = sequence.window_pages[sequence.num_left : kept_from]
        self.window_allocator.release(leaving)
        sequence.window_pages[sequence.num_left : kept_from] = [ABSENT] * len(leaving)
        sequence.num_left = kept_from

    def release(self, sequence: SequencePages) -> None:
        """Give back all pages of a sequence; it is empty afterwards."""
        self.allocator.release(sequence.pages)
        if self.window_allocator is not None:
            self.window_allocator.release(p for p in sequence.window_pages if p != ABSENT)
        sequence.pages, sequence.window_pages = [], []
        sequence.num_tokens = sequence.num_left = 0

    def check(self, sequences: Iterable[SequencePages]) -> None:
        """Prove that these sequences hold every page in use, each page once, and none too few.

        Raises:
            PageLeak: they do not.
        """
        sequences = list(sequences)
        self.allocator.check([page for sequence in sequences for page in sequence.pages])
        window = [page for s in sequences for page in s.window_pages if page != ABSENT]
        if self.window_allocator is not None:
            self.window_allocator.check(window)
        for sequence in sequences:
            self._check_sequence(sequence)

    def _check_sequence(self, sequence: SequencePages) -> None:
        if len(sequence.pages) != -(-sequence.num_tokens // self.page_size):
            raise PageLeak(f"{len(sequence.pages)} pages for {sequence.num_tokens} tokens")
        if self.window_allocator is None:
            if sequence.window_pages:
                raise PageLeak("window pages without a window pool")
        elif len(sequence.window_pages) != len(sequence.pages):
            raise PageLeak(f"{len(sequence.window_pages)} of {len(sequence.pages)} window pages")
        elif ABSENT in sequence.window_pages[self._kept_from(sequence) :]:
            raise PageLeak(f"a page of the last {self.tail_tokens} tokens has left the window")

    def _kept_from(self, sequence: SequencePages) -> int:
        """First logical page with one of the last tail_tokens tokens."""
        return max(0, sequence.num_tokens - self.tail_tokens) // self.page_size
