"""In which order pages leave a level: what was used longest ago first, and of a chain its end.

To use a page is to use all pages before it, so those that are here count as used later than it. So
a page never leaves before one that follows it, which nobody could find without it.

The host and the disk level keep their pages in this order, and so do the levels of a replay. Knows
keys only: no bytes, no room. Whoever changes it from several threads holds a lock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from kvpaging.base.ids import PageKey


class ChainOrder:
    """Keys, each with the key before it in its chain, by their last use."""

    def __init__(self) -> None:
        self._parents: OrderedDict[PageKey, PageKey] = OrderedDict()
        """The next one to leave comes first."""

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

    def add(self, pages: Iterable[tuple[PageKey, PageKey]]) -> None:
        """Put keys in, each with its parent, and use them."""
        added = dict(pages)
        self._parents.update(added)
        self.use(added)

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
