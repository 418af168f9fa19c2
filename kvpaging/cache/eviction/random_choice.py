"""Any leaf, by lot."""

from __future__ import annotations

import random

from kvpaging.base.ids import PageId, PageKey


class RandomChoice:
    """Each leaf is as likely as any other; the same seed gives the same choices."""

    def __init__(self, seed: int = 0):
        self._random = random.Random(seed)
        self._leaves: list[PageId] = []
        self._place: dict[PageId, int | None] = {}
        """Where a cached page is in `_leaves`; `None` for an inner page."""

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, page_id: PageId) -> bool:
        return page_id in self._place

    def add(self, page_id: PageId, key: PageKey, *, is_leaf: bool) -> None:
        """The page became cached."""
        self._place[page_id] = None
        if is_leaf:
            self.expose(page_id)

    def expose(self, page_id: PageId) -> None:
        """The page may be drawn from now on."""
        self._place[page_id] = len(self._leaves)
        self._leaves.append(page_id)

    def remove(self, page_id: PageId) -> None:
        """The page is no longer cached."""
        place = self._place.pop(page_id)
        if place is not None:
            last = self._leaves.pop()
            if last != page_id:
                self._leaves[place] = last
                self._place[last] = place

    def victim(self) -> PageId:
        """Remove and return a leaf. Raises KeyError when there is none."""
        if not self._leaves:
            raise KeyError("no cached page is a leaf")
        page_id = self._leaves[int(self._random.random() * len(self._leaves))]
        self.remove(page_id)
        return page_id
