"""Pages in order, of which only leaves can be taken."""

from __future__ import annotations

import heapq

from kvpaging.base.ids import PageId

Rank = tuple[float, int]


class LeafQueue:
    """Cached pages by priority, then by when they came; `pop` takes the first leaf.

    A heap over the leaves. A page that leaves the queue in another way than by `pop` leaves its
    heap entry behind; those are skipped, and swept out when they are more than the pages.
    """

    __slots__ = ("_heap", "_ranks", "_serial")

    def __init__(self) -> None:
        self._ranks: dict[PageId, Rank] = {}
        self._heap: list[tuple[Rank, PageId]] = []
        self._serial = 0

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, page_id: PageId) -> bool:
        return page_id in self._ranks

    @property
    def has_leaf(self) -> bool:
        """`pop` would find a page."""
        self._skip()
        return bool(self._heap)

    def push(self, page_id: PageId, priority: float, *, is_leaf: bool) -> None:
        """Add a page; the lowest priority goes first, the one that came first on a tie."""
        self._serial += 1
        self._ranks[page_id] = (priority, self._serial)
        if is_leaf:
            self.expose(page_id)

    def expose(self, page_id: PageId) -> None:
        """The page may be taken from now on. Raises KeyError if it is not here."""
        if len(self._heap) > 2 * len(self._ranks) + 64:
            self._heap = [entry for entry in self._heap if self._ranks.get(entry[1]) == entry[0]]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (self._ranks[page_id], page_id))

    def remove(self, page_id: PageId) -> None:
        """Take out this page. Raises KeyError if it is not here."""
        del self._ranks[page_id]

    def first_priority(self) -> float:
        """Of the page that `pop` would return. Raises KeyError when there is no leaf."""
        if not self.has_leaf:
            raise KeyError("no cached page is a leaf")
        return self._heap[0][0][0]

    def first(self) -> PageId:
        """The page that `pop` would return. Raises KeyError when there is no leaf."""
        if not self.has_leaf:
            raise KeyError("no cached page is a leaf")
        return self._heap[0][1]

    def pop(self) -> PageId:
        """Take out the first leaf. Raises KeyError when there is none."""
        if not self.has_leaf:
            raise KeyError("no cached page is a leaf")
        page_id = heapq.heappop(self._heap)[1]
        del self._ranks[page_id]
        return page_id

    def _skip(self) -> None:
        heap, ranks = self._heap, self._ranks
        while heap and ranks.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
