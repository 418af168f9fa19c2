"""Fixed-size pages with reference counts: `take`, `share`, `release`, all or nothing.

A page is free (nobody owns it, it holds nothing), held (one owner or more), cached (no owner, its
contents may be found again) or quarantined (a law was broken here: never handed out again).
Knows nothing of keys, tokens or sequences; which released pages stay cached, and which cached page
goes first, is the `CachedPages`' word. Every operation costs O(pages named), none O(pool).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from kvpaging.base.errors import LawBroken
from kvpaging.base.ids import PageId


class OutOfPages(Exception):
    """A signal inside the scheduler: more pages asked for than there are. Never leaves it."""

    def __init__(self, needed: int, available: int):
        super().__init__(f"{needed} pages needed, {available} available")
        self.needed = needed
        self.available = available


class CachedPages(Protocol):
    """Pages without an owner that are worth keeping."""

    def __len__(self) -> int: ...

    def __contains__(self, page_id: PageId) -> bool: ...

    def keep(self, page_id: PageId) -> bool:
        """Its last owner let go: keep it as cached (True), or it becomes free (False)."""

    def revive(self, page_id: PageId) -> None:
        """A cached page has an owner again, or holds nothing any more."""

    def evict(self) -> PageId:
        """Give up the page that is worth least. Only called when there is one."""


class PageAllocator:
    """Hands out pages 1 .. num_pages; page 0 is scratch and belongs to nobody."""

    def __init__(self, num_pages: int, cached: CachedPages):
        self.num_pages = num_pages
        self._cached = cached
        # A stack: the page that was given back last is the one that is still in the CPU's caches.
        self._free: list[PageId] = [PageId(i) for i in range(num_pages, 0, -1)]
        self._owners: list[int] = [0] * (num_pages + 1)
        self._num_held = 0
        self._quarantined: set[PageId] = set()

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages without an owner that may be found again."""
        return len(self._cached)

    @property
    def num_held(self) -> int:
        """Pages with at least one owner."""
        return self._num_held

    @property
    def num_quarantined(self) -> int:
        """Pages that a broken law touched."""
        return len(self._quarantined)

    @property
    def num_available(self) -> int:
        """Pages that `take` can hand out now."""
        return len(self._free) + len(self._cached)

    def num_owners(self, page_id: PageId) -> int:
        """How many leases name the page."""
        return self._owners[page_id]

    def state(self, page_id: PageId) -> str:
        """`free`, `held`, `cached` or `quarantined`."""
        if page_id in self._quarantined:
            return "quarantined"
        if self._owners[page_id]:
            return "held"
        return "cached" if page_id in self._cached else "free"

    def take(self, count: int) -> list[PageId]:
        """Take `count` pages, evicting cached ones. Raises OutOfPages having changed nothing."""
        if count > self.num_available:
            raise OutOfPages(count, self.num_available)
        taken = []
        for _ in range(count):
            page_id = self._free.pop() if self._free else self._cached.evict()
            self._owners[page_id] = 1
            taken.append(page_id)
        self._num_held += count
        return taken

    def share(self, page_ids: Iterable[PageId]) -> None:
        """Become one more owner of each page. Raises LawBroken for a free page."""
        page_ids = tuple(page_ids)
        for page_id in page_ids:
            if not self._owners[page_id] and page_id not in self._cached:
                raise LawBroken(f"page {page_id} was shared while {self.state(page_id)}")
        for page_id in page_ids:
            if not self._owners[page_id]:
                self._cached.revive(page_id)
                self._num_held += 1
            self._owners[page_id] += 1

    def release(self, page_ids: Sequence[PageId]) -> None:
        """Give each page back once, in the order given; a double release is our bug and raises."""
        for page_id in page_ids:
            if not self._owners[page_id]:
                raise LawBroken(f"page {page_id} was released while {self.state(page_id)}")
        for page_id in page_ids:
            self._owners[page_id] -= 1
            if self._owners[page_id] == 0:
                self._num_held -= 1
                if not self._cached.keep(page_id):
                    self._free.append(page_id)

    def discard(self, page_id: PageId) -> None:
        """What this cached page holds is worth nothing any more: it becomes free."""
        if page_id not in self._cached:
            raise LawBroken(f"page {page_id} was discarded while {self.state(page_id)}")
        self._cached.revive(page_id)
        self._free.append(page_id)

    def quarantine(self, page_id: PageId) -> None:
        """Take a held page that no lease names out of service, for good. Never released after."""
        if not self._owners[page_id]:
            raise LawBroken(f"page {page_id} can't be quarantined while {self.state(page_id)}")
        self._owners[page_id] = 0
        self._num_held -= 1
        self._quarantined.add(page_id)
