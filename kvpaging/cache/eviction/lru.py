"""Least recently used."""

from __future__ import annotations

from collections import OrderedDict

from kvpaging.base.ids import PageId, PageKey


class LeastRecentlyUsed:
    """The page that was given back longest ago goes first.

    It need not know which pages are leaves: a sequence gives its pages back tail first and owns
    every page before one it owns, so the oldest page is always a leaf.
    """

    def __init__(self) -> None:
        # Not a dict: after many deletions at its front, finding a dict's first key is linear.
        self._pages: OrderedDict[PageId, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, page_id: PageId) -> bool:
        return page_id in self._pages

    def add(self, page_id: PageId, key: PageKey, *, is_leaf: bool) -> None:
        """The page became cached; it is the last to go."""
        self._pages[page_id] = None

    def expose(self, page_id: PageId) -> None:
        """It keeps its place."""

    def remove(self, page_id: PageId) -> None:
        """The page is no longer cached."""
        del self._pages[page_id]

    def victim(self) -> PageId:
        """Remove and return the oldest. Raises KeyError when there is none."""
        return self._pages.popitem(last=False)[0]
