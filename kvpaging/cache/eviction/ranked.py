"""Policies that are one queue: what differs is a page's priority in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from kvpaging.base.ids import PageId, PageKey
from kvpaging.cache.eviction.leaf_queue import LeafQueue


class _Known(NamedTuple):
    """A page that is cached, or was found again and is in use; `key` tells it from a later one."""

    key: PageKey
    since: int
    uses: int


class _Ranked(ABC):
    def __init__(self) -> None:
        self._queue = LeafQueue()
        self._known: dict[PageId, _Known] = {}
        self._num_births = 0

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, page_id: PageId) -> bool:
        return page_id in self._queue

    def add(self, page_id: PageId, key: PageKey, *, is_leaf: bool) -> None:
        """The page became cached, for the first time or again."""
        known = self._known.get(page_id)
        if known is None or known.key != key:
            self._num_births += 1
            known = _Known(key, self._num_births, 0)
        known = known._replace(uses=known.uses + 1)
        self._known[page_id] = known
        self._queue.push(page_id, self._priority(known), is_leaf=is_leaf)

    def expose(self, page_id: PageId) -> None:
        """The page is a leaf now."""
        self._queue.expose(page_id)

    def remove(self, page_id: PageId) -> None:
        """The page is no longer cached; what is known of it stays, in case it comes back."""
        self._queue.remove(page_id)

    def victim(self) -> PageId:
        """Remove and return the leaf of lowest priority. Raises KeyError when there is none."""
        page_id = self._queue.pop()
        del self._known[page_id]
        return page_id

    @abstractmethod
    def _priority(self, known: _Known) -> float: ...


class FirstInFirstOut(_Ranked):
    """The page that was computed longest ago goes first, used or not."""

    def _priority(self, known: _Known) -> float:
        return known.since


class LeastFrequentlyUsed(_Ranked):
    """The page with the fewest uses goes first, the one used longest ago on a tie.

    Uses side by side count once: a page is counted when its last owner lets go. What was popular
    once stays for ever, unless `ageing`: then a page's uses are counted on top of those that the
    last victim had (LFU with dynamic ageing: Arlitt et al., "Evaluating content management
    techniques for Web proxy caches", 2000, section 4).
    """

    def __init__(self, *, ageing: bool):
        super().__init__()
        self._ageing = ageing
        self._age = 0.0

    def victim(self) -> PageId:
        """Remove and return the least used leaf. Raises KeyError when there is none."""
        if self._ageing:
            self._age = max(self._age, self._queue.first_priority())
        return super().victim()

    def _priority(self, known: _Known) -> float:
        return known.uses + self._age
