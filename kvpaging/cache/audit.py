"""The laws over pages, checked in production, a slice at a time.

1. free + cached + held + quarantined = all pages.
2. A page's reference count is the number of leases that name it.
3. A page with a key is full and computed: no lease has published more than it committed.
6. No cached page is unreachable: its parent's key has a page, or is the root.

A leaked page (held by nobody's lease) is quarantined and the rest serves on. A lease that names a
page which isn't held might read another's tokens: that raises, and the engine stops.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from kvpaging.base.errors import LawBroken
from kvpaging.base.ids import PageId
from kvpaging.cache.cache_manager import CacheManager
from kvpaging.cache.page_lease import PageLease

PAGES_PER_SLICE = 512


class Audit:
    """Walks over a cache's pages again and again, never more than a slice a call."""

    def __init__(self, cache: CacheManager):
        self._cache = cache
        self._leases: Iterator[PageLease] = iter(())
        self._next_page = 1
        self.breaches: list[str] = []
        """What was found and mended by quarantine, in words."""

    def check_counts(self) -> None:
        """Law 1, in O(1). Raises LawBroken."""
        pages = self._cache.allocator
        total = pages.num_free + pages.num_cached + pages.num_held + pages.num_quarantined
        if total != pages.num_pages:
            raise LawBroken(
                f"{pages.num_free} free + {pages.num_cached} cached + {pages.num_held} held + "
                f"{pages.num_quarantined} quarantined pages are not {pages.num_pages}"
            )

    def check_next_lease(self) -> None:
        """One lease's pages: each is held. Raises LawBroken."""
        lease = next(self._leases, None)
        if lease is None:
            self._leases = iter(tuple(self._cache.leases.values()))
            lease = next(self._leases, None)
        if lease is not None and lease.is_live:
            self._check_lease(lease)

    def _check_lease(self, lease: PageLease) -> None:
        pages = self._cache.allocator
        for page_id in islice(lease.pages, PAGES_PER_SLICE):
            if pages.num_owners(page_id) < 1:
                raise LawBroken(f"a lease names page {page_id}, which is {pages.state(page_id)}")

    def check_idle_slice(self) -> bool:
        """With no lease alive: laws 2 and 6 on the next slice of pages; quarantines leaked ones.

        Returns whether the walk is not at its end.
        """
        if self._cache.leases:
            return False
        last = min(self._next_page + PAGES_PER_SLICE, self._cache.allocator.num_pages + 1)
        for page_id in range(self._next_page, last):
            self._check_idle_page(PageId(page_id))
        at_end = last > self._cache.allocator.num_pages
        self._next_page = 1 if at_end else last
        return not at_end

    def _check_idle_page(self, page_id: PageId) -> None:
        cache = self._cache
        state = cache.allocator.state(page_id)
        if state == "held":
            cache.quarantine(page_id)
            self.breaches.append(f"page {page_id} was held by no lease; quarantined")
        elif state == "cached":
            parent = cache.index.entry(page_id).parent
            if parent != cache.root and not cache.index.has_key(parent):
                self.breaches.append(f"cached page {page_id} can't be reached: its parent is gone")
        elif state == "free" and page_id in cache.index:
            raise LawBroken(f"page {page_id} is free and still published")
