"""What an eviction policy is told, and what it must answer.

A page is cached while nobody owns it and its contents may be found again. A policy sees pages come
(their last owner let go) and go (found again, or evicted): a page that goes and comes back with the
same key was used again. Pages are evicted one at a time and leaves first: a page whose children are
cached is *inner*, and evicting it would strand them. An inner page may become a leaf while it is
cached (`expose`), never the other way round: a child comes into being under an owner, and then its
parent has one too.

Knows nothing of owners, tokens or bytes.
"""

from __future__ import annotations

from typing import Protocol

from kvpaging.base.ids import PageId, PageKey


class EvictionPolicy(Protocol):
    """An order over cached pages; every operation O(1) or O(log n), amortised."""

    def __len__(self) -> int: ...

    def __contains__(self, page_id: PageId) -> bool: ...

    def add(self, page_id: PageId, key: PageKey, *, is_leaf: bool) -> None:
        """The page became cached. `key` names what it holds, also after it was evicted."""

    def expose(self, page_id: PageId) -> None:
        """The last child of this cached page is gone: it is a leaf now."""

    def remove(self, page_id: PageId) -> None:
        """The page is no longer cached: it was found again, or its contents are void."""

    def victim(self) -> PageId:
        """Remove and return the leaf worth least. Raises KeyError when there is none."""
