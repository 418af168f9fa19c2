"""Which cached page goes first.

A policy sees pages come (their last owner let go) and go (found again, or evicted). A sequence
gives its pages back tail first and owns every page before one it owns, so least-recently-used
order never evicts a parent before its child.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from kvpaging.base.ids import PageId


class EvictionPolicy(Protocol):
    """An order over cached pages; every operation O(1)."""

    def __len__(self) -> int: ...

    def __contains__(self, page_id: PageId) -> bool: ...

    def add(self, page_id: PageId) -> None:
        """The page became cached."""

    def remove(self, page_id: PageId) -> None:
        """The page is no longer cached: it was found again."""

    def victim(self) -> PageId:
        """Remove and return the page worth least. Raises KeyError when there is none."""


class LeastRecentlyUsed:
    """The page that was given back longest ago goes first."""

    def __init__(self) -> None:
        # Not a dict: after many deletions at its front, finding a dict's first key is linear.
        self._pages: OrderedDict[PageId, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, page_id: PageId) -> bool:
        return page_id in self._pages

    def add(self, page_id: PageId) -> None:
        """The page became cached; it is the last to go."""
        self._pages[page_id] = None

    def remove(self, page_id: PageId) -> None:
        """The page is no longer cached."""
        del self._pages[page_id]

    def victim(self) -> PageId:
        """Remove and return the oldest. Raises KeyError when there is none."""
        return self._pages.popitem(last=False)[0]
