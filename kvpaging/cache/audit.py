"""The laws over pages, checked in production, a slice at a time.

1. free + cached + held + quarantined = all pages.
2. A page that a lease names is held; with no lease alive, only pinned ones are.
6. No cached page is unreachable: its parent's key has a page, or is the root.

A leaked page (held by nobody's lease) is quarantined, an unreachable one forgotten, and the rest
serves on; both are logged as errors. A lease that names a page which isn't held might read
another's tokens: that raises, and the engine stops.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from itertools import islice

from kvpaging.base.errors import LawBroken
from kvpaging.base.ids import PageId
from kvpaging.cache.cache_manager import CacheManager
from kvpaging.cache.page_lease import PageLease

_logger = logging.getLogger(__name__)

PAGES_PER_SLICE = 512


class Audit:
    """Walks over a cache's pages again and again, never more than a slice a call."""

    def __init__(self, cache: CacheManager):
        self._cache = cache
        self._leases: Iterator[PageLease] = iter(())
        self._lease: PageLease | None = None
        self._next_in_lease = 0
        self._next_page = 1
        self.num_breaches = 0
        self.breaches: deque[str] = deque(maxlen=8)
        """The last ones, in words; what they touched is out of service."""

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
        """The next slice of a lease's pages: each is held. Raises LawBroken."""
        lease = self._lease
        if lease is None or not lease.is_live or self._next_in_lease >= len(lease.pages):
            lease = self._lease = self._following_lease()
            self._next_in_lease = 0
        if lease is None:
            return
        last = self._next_in_lease + PAGES_PER_SLICE
        pages = self._cache.allocator
        for page_id in islice(lease.pages, self._next_in_lease, last):
            if pages.num_owners(page_id) < 1:
                raise LawBroken(f"a lease names page {page_id}, which is {pages.state(page_id)}")
        self._next_in_lease = last

    def _following_lease(self) -> PageLease | None:
        """The next one alive; after the last of a round the first of a new one."""
        for _ in range(2):
            for lease in self._leases:
                if lease.is_live:
                    return lease
            self._leases = iter(tuple(self._cache.leases.values()))
        return None

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
        if state == "held" and cache.pins.owns(page_id):
            return
        if state == "held":
            cache.quarantine(page_id)
            self._report(f"page {page_id} was held by no lease; quarantined")
        elif state == "cached":
            parent = cache.index.entry(page_id).parent
            if parent != cache.root and not cache.index.has_key(parent):
                cache.discard(page_id)
                self._report(f"cached page {page_id} could not be reached; forgotten")
        elif state == "free" and page_id in cache.index:
            raise LawBroken(f"page {page_id} is free and still published")

    def _report(self, breach: str) -> None:
        self.num_breaches += 1
        self.breaches.append(breach)
        _logger.error("a law was broken: %s", breach)
