"""Adaptive replacement: pages used once and pages used again share the cache by what pays.

Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003, figure 4. One
thing differs: pages are taken before it is known what they will hold, so what a ghost teaches is
learnt when its page comes back computed, which is one eviction later.
"""

from __future__ import annotations

from kvpaging.base.ids import PageId, PageKey
from kvpaging.cache.eviction.ghosts import Ghosts
from kvpaging.cache.eviction.leaf_queue import LeafQueue


class AdaptiveReplacement:
    """Two lists in order of last use, and the keys that were lately evicted from each."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._target = 0.0
        """How many pages of the list `once` are worth keeping; the paper's p."""
        self._once = LeafQueue()
        self._again = LeafQueue()
        self._once_ghosts = Ghosts()
        self._again_ghosts = Ghosts()
        self._keys: dict[PageId, PageKey] = {}
        """Of cached pages, and of those that were found again and are in use."""
        self._learnt_from_again = False

    def __len__(self) -> int:
        return len(self._once) + len(self._again)

    def __contains__(self, page_id: PageId) -> bool:
        return page_id in self._once or page_id in self._again

    def add(self, page_id: PageId, key: PageKey, *, is_leaf: bool) -> None:
        """The page became cached, for the first time or again."""
        used_again = self._keys.get(page_id) == key
        self._keys[page_id] = key
        if used_again or self._learn(key):
            self._again.push(page_id, 0, is_leaf=is_leaf)
        else:
            self._once.push(page_id, 0, is_leaf=is_leaf)
        self._once_ghosts.trim(self._capacity - len(self._once))
        self._again_ghosts.trim(2 * self._capacity - len(self) - len(self._once_ghosts))

    def _learn(self, key: PageKey) -> bool:
        """Move the target if this page was evicted too early; returns whether it was."""
        num_once, num_again = len(self._once_ghosts), len(self._again_ghosts)
        self._learnt_from_again = False
        if self._once_ghosts.discard(key):
            self._target = min(self._capacity, self._target + max(1.0, num_again / num_once))
            return True
        if self._again_ghosts.discard(key):
            self._target = max(0.0, self._target - max(1.0, num_once / num_again))
            self._learnt_from_again = True
            return True
        return False

    def expose(self, page_id: PageId) -> None:
        """The page is a leaf now."""
        (self._once if page_id in self._once else self._again).expose(page_id)

    def remove(self, page_id: PageId) -> None:
        """The page is no longer cached; its key stays known, in case it comes back."""
        (self._once if page_id in self._once else self._again).remove(page_id)

    def victim(self) -> PageId:
        """Remove and return a leaf. Raises KeyError when there is none."""
        above = len(self._once) - self._target
        from_once = above > 0 or (above == 0 and self._learnt_from_again)
        if not (self._once if from_once else self._again).has_leaf:
            from_once = not from_once
        page_id = (self._once if from_once else self._again).pop()
        (self._once_ghosts if from_once else self._again_ghosts).add(self._keys.pop(page_id))
        return page_id
