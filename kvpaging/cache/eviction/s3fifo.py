"""S3-FIFO: a small queue on probation, a main queue, and the keys that failed probation.

Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvpaging.base.ids import PageId, PageKey
from kvpaging.cache.eviction.ghosts import Ghosts
from kvpaging.cache.eviction.leaf_queue import LeafQueue

SMALL_RATIO = 0.1
MAX_USES = 3


@dataclass(slots=True)
class _Known:
    """A page that is cached, or was found again and is in use."""

    key: PageKey
    is_main: bool
    since: int
    """Its place in the queue: pages keep it while they are in use."""
    uses: int = 0
    """Since it was computed, or since its turn last came; at most `MAX_USES`."""


class S3Fifo:
    """New pages must be used twice within a tenth of the cache to stay longer."""

    def __init__(self, capacity: int):
        self._small_limit = max(1, int(capacity * SMALL_RATIO))
        self._max_ghosts = capacity - self._small_limit
        self._small = LeafQueue()
        self._main = LeafQueue()
        self._ghosts = Ghosts()
        self._known: dict[PageId, _Known] = {}
        self._num_places = 0

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def __contains__(self, page_id: PageId) -> bool:
        return page_id in self._small or page_id in self._main

    def add(self, page_id: PageId, key: PageKey, *, is_leaf: bool) -> None:
        """The page became cached, for the first time or again."""
        known = self._known.get(page_id)
        if known is None or known.key != key:
            known = _Known(key, self._ghosts.discard(key), self._next_place())
            self._known[page_id] = known
        else:
            known.uses = min(known.uses + 1, MAX_USES)
        self._queue_of(known).push(page_id, known.since, is_leaf=is_leaf)

    def expose(self, page_id: PageId) -> None:
        """The page is a leaf now."""
        self._queue_of(self._known[page_id]).expose(page_id)

    def remove(self, page_id: PageId) -> None:
        """The page is no longer cached; what is known of it stays, in case it comes back."""
        self._queue_of(self._known[page_id]).remove(page_id)

    def victim(self) -> PageId:
        """Remove and return a leaf. Raises KeyError when there is none.

        Each page that is passed over loses a use or moves to the main queue, so the cost is
        amortised over the uses.
        """
        while True:
            from_small = len(self._small) >= self._small_limit or not self._main.has_leaf
            if from_small and not self._small.has_leaf:
                from_small = False
            page_id = (self._small if from_small else self._main).pop()
            known = self._known[page_id]
            if known.uses > (1 if from_small else 0):
                known.uses = 0 if from_small else known.uses - 1
                known.is_main = True
                known.since = self._next_place()
                self._main.push(page_id, known.since, is_leaf=True)
                continue
            del self._known[page_id]
            if from_small:
                self._ghosts.add(known.key)
                self._ghosts.trim(self._max_ghosts)
            return page_id

    def _queue_of(self, known: _Known) -> LeafQueue:
        return self._main if known.is_main else self._small

    def _next_place(self) -> int:
        self._num_places += 1
        return self._num_places
