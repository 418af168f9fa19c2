"""Which pages left a level, when and why: a bounded memory, for explanations and counters.

Keys name a tenant's pages only (the namespace is hashed in), so whoever can't name a page learns
nothing of it. Knows no pages, only keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Final, NamedTuple

from kvpaging.base.ids import PageKey

DEFAULT_REMEMBERED: Final = 65_536
"""At some 200 bytes each: no more than 26 MB."""


class EvictionCause(StrEnum):
    """Why a page left its level."""

    ROOM = "room"
    """Another page was needed, and the policy chose this one."""
    FLUSH = "flush"
    """The operator emptied the cache."""
    EXPIRED = "expired"
    """Its time was over."""
    BUDGET = "budget"
    """Its tenant needed another, and may have no more."""
    CORRUPT = "corrupt"
    """Its bytes were found broken."""


class Eviction(NamedTuple):
    """When and why."""

    at_s: float
    """On the clock that `EvictionLog.now_s` is told from."""
    cause: EvictionCause


class Evicted(NamedTuple):
    """How long ago and why."""

    ago_s: float
    cause: EvictionCause


class EvictionLog:
    """The last evictions by key, at least `num_remembered` and at most twice as many; all counted.

    Two generations: when the young one is full it becomes the old one, and the old one is dropped
    as a whole. So an eviction costs one insertion, whatever was forgotten.

    One thread at a time may add; any may find, and may miss what is added meanwhile.
    """

    def __init__(self, num_remembered: int = DEFAULT_REMEMBERED) -> None:
        self.counts: dict[EvictionCause, int] = dict.fromkeys(EvictionCause, 0)
        self._num_remembered = num_remembered
        self._young: dict[PageKey, Eviction] = {}
        self._old: dict[PageKey, Eviction] = {}
        self._stamps: dict[EvictionCause, Eviction] = {}
        self._now_s = 0.0

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    @property
    def num_evicted(self) -> int:
        """Pages that left for want of room."""
        return self.counts[EvictionCause.ROOM]

    @property
    def now_s(self) -> float:
        """The time that evictions get from now on. Whoever has a clock sets it."""
        return self._now_s

    @now_s.setter
    def now_s(self, now_s: float) -> None:
        self._now_s = now_s
        self._stamps.clear()

    def add(self, key: PageKey, cause: EvictionCause) -> None:
        """The page with this key has left."""
        self.counts[cause] += 1
        stamp = self._stamps.get(cause)
        if stamp is None:  # one object for all evictions of a step
            stamp = self._stamps[cause] = Eviction(self._now_s, cause)
        if len(self._young) >= self._num_remembered:
            self._old, self._young = self._young, {}
        self._young[key] = stamp

    def find(self, key: PageKey) -> Eviction | None:
        """The last eviction of this key, if it is remembered. It may have come back since."""
        return self._young.get(key) or self._old.get(key)

    def ages(self, keys: Iterable[PageKey], now_s: float) -> list[Evicted | None]:
        """How long before `now_s` each of these keys left, if that is remembered."""
        young, old = self._young.get, self._old.get  # `find`, without a call for each of thousands
        found = (young(key) or old(key) for key in keys)
        return [one and Evicted(max(0.0, now_s - one.at_s), one.cause) for one in found]
