"""In which order pages leave a level: what was used longest ago first, and of a chain its end.

To use a page is to use all pages before it, so those that are here count as used later than it. So
a page never leaves before one that follows it, which nobody could find without it. Nor does a page
come that follows one without room: it would push out what comes before that one.

The host and the disk level keep their pages in this order, and so do the levels of a replay. Knows
keys only: no bytes, no room. Whoever changes it from several threads holds a lock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Final

from kvpaging.base.ids import PageKey

MAX_REFUSED: Final = 65_536
"""Keys that found no room, of which so many are remembered."""


class ChainOrder:
    """Keys, each with the key before it in its chain, by their last use."""

    def __init__(self) -> None:
        self._parents: OrderedDict[PageKey, PageKey] = OrderedDict()
        """The next one to leave comes first."""
        self._refused: OrderedDict[PageKey, None] = OrderedDict()
        """The one that found no room longest ago comes first."""

    def __len__(self) -> int:
        return len(self._parents)

    def __contains__(self, key: PageKey) -> bool:
        return key in self._parents

    def __iter__(self) -> Iterator[PageKey]:
        """From the next one to leave on."""
        return iter(self._parents)

    def __reversed__(self) -> Iterator[PageKey]:
        """Parents before their children."""
        return reversed(self._parents)

    @property
    def first(self) -> PageKey | None:
        """The next one to leave; no other key here comes after it in its chain."""
        return next(iter(self._parents), None)

    def parent(self, key: PageKey) -> PageKey:
        """The key before this one, which need not be here. Raises KeyError if this one is not."""
        return self._parents[key]

    def add(self, pages: Iterable[tuple[PageKey, PageKey]]) -> Iterable[PageKey]:
        """Put keys in, each with its parent, and use them; returns all that count as used by that.

        Those are left out that follow one that found no room.
        """
        added: dict[PageKey, PageKey] = {}
        for key, parent in pages:
            if parent in self._refused and key not in self._parents:
                self.refuse(key)
                continue
            added[key] = parent
            self._refused.pop(key, None)
        self._parents.update(added)
        return self.use(added)

    def refuse(self, key: PageKey) -> None:
        """There is no room for it: all that is here counts for more."""
        self._parents.pop(key, None)
        self._refused[key] = None
        self._refused.move_to_end(key)
        if len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)

    def was_refused(self, key: PageKey) -> bool:
        """It found no room when it came last, not long ago."""
        return key in self._refused

    def use(self, keys: Iterable[PageKey]) -> Iterable[PageKey]:
        """These are used, the first of them most of all; keys that are not here are left out.

        Returns all that count as used by that. O(their number and that of the pages before them).
        """
        parents = self._parents
        latest: dict[PageKey, None] = {}  # the one to leave last first: parents before children
        for key in keys:
            path: dict[PageKey, None] = {}
            # A chain has no ring; what lies on a disk or came from a server may say what it likes.
            while key in parents and key not in latest and key not in path:
                path[key] = None
                key = parents[key]
            latest.update(dict.fromkeys(reversed(path)))
        for key in reversed(latest):
            parents.move_to_end(key)
        return latest

    def remove(self, key: PageKey) -> None:
        """This key has left. Nothing where it is not here."""
        self._parents.pop(key, None)

    def clear(self) -> None:
        """All have left."""
        self._parents.clear()
        self._refused.clear()
