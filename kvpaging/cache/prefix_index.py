"""From a prefix to the pages that hold it: `publish`, `match`, `withdraw`.

One key may have several pages: sequences that computed the same prefix side by side. With one page
per key, evicting one twin would strand the other's deeper pages.
Knows nothing of owners or of eviction order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kvpaging.base.errors import LawBroken
from kvpaging.base.ids import PageId, PageKey
from kvpaging.cache.prefix_key import ChainLink, PrefixChain


class IndexedPage(NamedTuple):
    """What a published page holds."""

    parent: PageKey
    link: ChainLink


class PrefixIndex:
    """Published pages by key. All operations cost O(pages named)."""

    def __init__(self) -> None:
        self._twins: dict[PageKey, list[PageId]] = {}
        self._pages: dict[PageId, IndexedPage] = {}
        self._num_children: dict[PageKey, int] = {}

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, page_id: PageId) -> bool:
        return page_id in self._pages

    def __iter__(self) -> Iterator[PageId]:
        return iter(self._pages)

    def publish(self, page_id: PageId, parent: PageKey, link: ChainLink) -> None:
        """Say that the page is full and holds `link`. A page is published at most once."""
        if page_id in self._pages:
            raise LawBroken(f"page {page_id} was published twice")
        self._pages[page_id] = IndexedPage(parent, link)
        self._twins.setdefault(link.key, []).append(page_id)
        self._num_children[parent] = self._num_children.get(parent, 0) + 1

    def withdraw(self, page_id: PageId) -> None:
        """The page no longer holds what was published."""
        parent, link = self._pages.pop(page_id)
        twins = self._twins[link.key]
        twins.remove(page_id)
        if not twins:
            del self._twins[link.key]
        self._num_children[parent] -= 1
        if not self._num_children[parent]:
            del self._num_children[parent]

    def match(self, chain: PrefixChain, max_pages: int) -> list[PageId]:
        """The longest run of pages that holds the chain's beginning. A question."""
        found: list[PageId] = []
        for link in chain.links[:max_pages]:
            page_id = self._find(link)
            if page_id is None:
                break
            found.append(page_id)
        return found

    def _find(self, link: ChainLink) -> PageId | None:
        for page_id in self._twins.get(link.key, ()):
            if self._pages[page_id].link.tokens == link.tokens:
                return page_id
        return None

    def has_key(self, key: PageKey) -> bool:
        """Some page holds this key."""
        return key in self._twins

    def pages_of(self, key: PageKey) -> tuple[PageId, ...]:
        """The pages that hold this key, the one published first in front."""
        return tuple(self._twins.get(key, ()))

    def has_children(self, key: PageKey) -> bool:
        """Some published page comes right after this key."""
        return key in self._num_children

    def entry(self, page_id: PageId) -> IndexedPage:
        """What was published for the page. Raises KeyError."""
        return self._pages[page_id]
