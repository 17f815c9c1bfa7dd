"""The physical pages of one pool: who holds them, and what is known of the others. No tensors.

A page is in one of three states:
    free    nobody holds it and nothing in it is of use;
    used    so many sequences hold it;
    cached  nobody holds it, but its contents have a name under which they may be asked for again.

A name is given to contents that will not change any more. A cached page is free memory too: when
no free page is left, the one that was given back first loses its name and is handed out.

Physical page 0 is scratch and is never handed out.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable


class OutOfPages(RuntimeError):
    """A pool has fewer free pages than were asked for. Nothing was taken."""


class PageLeak(RuntimeError):
    """Pages in use, pages held and free pages do not add up: a bug of the accounting."""


class PagePool:
    """Hands out pages, counts their holders, and remembers contents by name."""

    def __init__(self, num_pages: int) -> None:
        """num_pages counts the scratch page 0 too."""
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages} must be at least 2: page 0 is scratch")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._holders: dict[int, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that allocate can hand out, cached ones among them."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return len(self._holders)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds and whose contents are still known."""
        return len(self._cached)

    def in_use(self) -> frozenset[int]:
        """The pages that somebody holds."""
        return frozenset(self._holders)

    def is_used(self, page: int) -> bool:
        """Whether anybody holds the page."""
        return page in self._holders

    def is_shared(self, page: int) -> bool:
        """Whether several hold the page."""
        return self._holders.get(page, 0) > 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages of one holder each. Raises OutOfPages and takes none if there are
        fewer."""
        if count > self.num_free:
            raise OutOfPages(
                f"{count} pages are needed and {self.num_free} of {self.num_pages - 1} are free"
            )
        taken = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        self._holders.update(dict.fromkeys(taken, 1))
        return taken

    def find(self, name: bytes) -> int | None:
        """The page whose contents have this name."""
        return self._page_of.get(name)

    def hold(self, page: int) -> None:
        """One holder more for a used or a cached page. Raises ValueError for a free one."""
        if page in self._cached:
            del self._cached[page]
            self._holders[page] = 1
        elif page in self._holders:
            self._holders[page] += 1
        else:
            raise ValueError(f"page {page} is free: there is nothing to share")

    def release(self, pages: Iterable[int], *, is_passing: bool = False) -> None:
        """One holder less for each page. Raises ValueError for a page that is not in use.

        A named page that nobody holds any more stays cached, the earlier in `pages` the shorter.
        is_passing: they are unlikely to be asked for again, and go before all others.
        """
        for page in pages:
            if page not in self._holders:
                raise ValueError(f"page {page} is given back but is not in use")
            if self._holders[page] > 1:
                self._holders[page] -= 1
                continue
            del self._holders[page]
            if page not in self._name_of:
                self._free.append(page)
                continue
            self._cached[page] = None
            if is_passing:
                self._cached.move_to_end(page, last=False)

    def name(self, page: int, name: bytes) -> None:
        """Make the contents of a used page known, unless they or their name are already."""
        if page not in self._holders:
            raise ValueError(f"page {page} is not in use: its contents are nobody's")
        if page not in self._name_of and name not in self._page_of:
            self._name_of[page] = name
            self._page_of[name] = page

    def forget(self) -> None:
        """Drop all names. Cached pages become free ones."""
        self._free += self._cached
        self._cached.clear()
        self._page_of.clear()
        self._name_of.clear()

    def check(self, held: Iterable[int]) -> None:
        """Prove that `held`, a page as often as it has holders, are the pages in use, and that
        every page is in one state.

        Raises:
            PageLeak: they are not.
        """
        holders = Counter(held)
        if holders != self._holders:
            lost = sorted(set(self._holders) - set(holders))
            foreign = sorted(set(holders) - set(self._holders))
            counts = {
                page: (count, self._holders[page])
                for page, count in holders.items()
                if count != self._holders.get(page, count)
            }
            raise PageLeak(
                f"pages in use that nobody holds: {lost}; held but not in use: {foreign}; "
                f"holders, found and counted: {counts}"
            )
        states = [*self._free, *self._holders, *self._cached]
        if len(states) != len(set(states)) or set(states) != set(range(1, self.num_pages)):
            raise PageLeak(
                f"{len(self._free)} free, {len(self._holders)} used and {len(self._cached)} cached "
                f"pages are not the {self.num_pages - 1} of the pool"
            )
        if {name: page for page, name in self._name_of.items()} != self._page_of:
            raise PageLeak("names and pages do not belong to each other")
        if set(self._free) & set(self._name_of) or not set(self._cached) <= set(self._name_of):
            raise PageLeak("a free page has a name, or a cached one has none")

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        del self._page_of[self._name_of.pop(page)]
        return page
