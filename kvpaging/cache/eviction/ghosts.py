"""Keys of pages that were evicted: what a policy learns its mistakes from."""

from __future__ import annotations

from collections import OrderedDict

from kvpaging.base.ids import PageKey


class Ghosts:
    """Keys in order of eviction."""

    __slots__ = ("_keys",)

    def __init__(self) -> None:
        self._keys: OrderedDict[PageKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: PageKey) -> bool:
        return key in self._keys

    def add(self, key: PageKey) -> None:
        """The page with this key was evicted; it is the last to be forgotten."""
        self._keys[key] = None
        self._keys.move_to_end(key)

    def discard(self, key: PageKey) -> bool:
        """Forget the key; returns whether it was here."""
        if key not in self._keys:
            return False
        del self._keys[key]
        return True

    def trim(self, limit: int) -> None:
        """Forget the oldest until no more than `limit` are left."""
        while len(self._keys) > max(0, limit):
            self._keys.popitem(last=False)
