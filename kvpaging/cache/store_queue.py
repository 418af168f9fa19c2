"""Orders to copy pages down, handed out a few a step.

All of a long prompt's pages at once would hold up everybody's step, and be more than is written in
time. A page that waits here and leaves the device goes at once, since its memory is written next.
Knows what was ordered, not which pages are worth it.
"""

from __future__ import annotations

from itertools import islice

from kvpaging.base.ids import PageId
from kvpaging.cache.lower_levels import LowerLevels, PageStore


class StoreQueue:
    """Orders in the order in which they came up; nothing where there are no levels."""

    def __init__(self, levels: LowerLevels | None) -> None:
        self._levels = levels
        self._wants_evicted = levels is not None and levels.wants_evicted
        self._waiting: dict[PageId, PageStore] = {}
        self._urgent: list[PageStore] = []

    def __len__(self) -> int:
        return len(self._waiting) + len(self._urgent)

    def add(self, order: PageStore) -> None:
        """Copy this page down when there is time. A later order for a page takes the place."""
        self._waiting[order.page_id] = order

    def withdrawn(self, page_id: PageId) -> None:
        """The page may be written to from the next step on."""
        order = self._waiting.pop(page_id, None)
        if order is not None:
            self._urgent.append(order)

    def evicted(self, order: PageStore) -> None:
        """The page leaves the device, and goes to the levels that take such pages."""
        if self._wants_evicted:
            self._urgent.append(order)

    def hurry(self) -> None:
        """All that was ordered so far is copied by the next step, whatever the room."""
        self._urgent.extend(self._waiting.values())
        self._waiting.clear()

    def drop(self) -> None:
        """Copy nothing of what was ordered so far."""
        self._waiting.clear()
        self._urgent.clear()

    def take(self) -> tuple[PageStore, ...]:
        """What the next step shall copy before it writes anything: what must, and what may."""
        taken, self._urgent = self._urgent, []
        if self._waiting and self._levels is not None:
            num_pages = min(self._levels.num_storable(), len(self._waiting))
            for page_id in tuple(islice(self._waiting, num_pages)):
                taken.append(self._waiting.pop(page_id))
        return tuple(taken)
