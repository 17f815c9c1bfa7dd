"""Page accounting: which physical pages hold which tokens of which sequence. No tensors.

A sequence has two rows of pages. Its `pages` hold every token, for as long as it lives. Its
`window_pages` hold the last `tail_tokens` tokens; older ones are given back and leave -1 behind.

Physical page 0 of each pool is scratch and is never handed out.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

ABSENT = -1


class OutOfPages(RuntimeError):
    """A pool has fewer free pages than were asked for. Nothing was taken."""


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

    def in_use(self) -> frozenset[int]:
        """The pages that were handed out."""
        return frozenset(self._used)


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

    def can_extend(self, sequence: SequencePages, num_new_tokens: int) -> bool:
        """Whether extend would find the pages."""
        missing = self._missing(sequence, num_new_tokens)
        if missing > self.allocator.num_free:
            return False
        if self.window_allocator is None:
            return True
        leaving = self._kept_from(sequence) - sequence.num_left
        return missing <= self.window_allocator.num_free + leaving

    def extend(self, sequence: SequencePages, num_new_tokens: int) -> None:
        """Make room for the next tokens of a sequence.

        Window pages that the next tokens do not reach any more are given back first.

        Raises:
            ValueError: num_new_tokens is not positive.
            OutOfPages: a pool is exhausted; the sequence is as it was.
        """
        if num_new_tokens < 1:
            raise ValueError(f"num_new_tokens={num_new_tokens} must be positive")
        if not self.can_extend(sequence, num_new_tokens):
            window = "none" if self.window_allocator is None else self.window_allocator.num_free
            raise OutOfPages(
                f"{self._missing(sequence, num_new_tokens)} pages are needed; free: "
                f"{self.allocator.num_free}, in the window pool: {window}"
            )
        missing = self._missing(sequence, num_new_tokens)
        self.trim(sequence)
        if self.window_allocator is not None:
            sequence.window_pages += self.window_allocator.allocate(missing)
        sequence.pages += self.allocator.allocate(missing)
        sequence.num_tokens += num_new_tokens

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

    def _missing(self, sequence: SequencePages, num_new_tokens: int) -> int:
        needed = -(-(sequence.num_tokens + num_new_tokens) // self.page_size)
        return needed - len(sequence.pages)

    def _kept_from(self, sequence: SequencePages) -> int:
        """First logical page with one of the last tail_tokens tokens."""
        return max(0, sequence.num_tokens - self.tail_tokens) // self.page_size
