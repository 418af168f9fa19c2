"""Retention priorities on top of any policy."""

from __future__ import annotations

from collections.abc import Callable

from kvpaging.base.ids import PageId, PageKey
from kvpaging.cache.eviction.policy import EvictionPolicy


class ByPriority:
    """One policy for each priority; the pages of the lowest go first, in their policy's order.

    A page is worth at least what those after it are: so the lowest priority that has a page at
    all has a leaf.
    """

    def __init__(
        self, make_policy: Callable[[], EvictionPolicy], priority_of: Callable[[PageKey], int]
    ):
        self._make_policy = make_policy
        self._priority_of = priority_of
        self._ordinary = make_policy()
        """For priority 0: nearly all pages, in most servers all."""
        self._others: dict[int, EvictionPolicy] = {}
        self._places: dict[PageId, EvictionPolicy] = {}
        """Of the pages that are not ordinary."""

    def __len__(self) -> int:
        return len(self._ordinary) + len(self._places)

    def __contains__(self, page_id: PageId) -> bool:
        return page_id in self._ordinary or page_id in self._places

    def add(self, page_id: PageId, key: PageKey, *, is_leaf: bool) -> None:
        """The page became cached; its priority is asked for now."""
        priority = self._priority_of(key)
        policy = self._ordinary
        if priority:
            if priority not in self._others:
                self._others[priority] = self._make_policy()
            policy = self._places[page_id] = self._others[priority]
        policy.add(page_id, key, is_leaf=is_leaf)

    def expose(self, page_id: PageId) -> None:
        """The page is a leaf now."""
        self._places.get(page_id, self._ordinary).expose(page_id)

    def remove(self, page_id: PageId) -> None:
        """The page is no longer cached."""
        self._places.pop(page_id, self._ordinary).remove(page_id)

    def victim(self) -> PageId:
        """Remove and return a leaf of the lowest priority. Raises KeyError when there is none."""
        if not self._places:
            return self._ordinary.victim()
        used = {priority: policy for priority, policy in self._others.items() if len(policy)}
        if len(self._ordinary):
            used[0] = self._ordinary
        page_id = used[min(used)].victim()
        self._places.pop(page_id, None)
        return page_id
