"""What is to stay longer, or not so long, than its use alone says: priorities and times, by key.

Only keys that differ from the ordinary are here. A key that several requests use gets the best of
what they ask for. Since each of them uses everything before the key as well, what comes before a
page stays at least as long and is worth at least as much: leaves go first in every respect.

Knows keys only, no pages; the time is told.
"""

from __future__ import annotations

import heapq
import math
from typing import Final

from kvpaging.base.ids import PageKey
from kvpaging.cache.retention import Retention

MIN_SWEPT: Final = 64
"""Entries of forgotten keys that may always stay in the queue."""


class _Mark:
    __slots__ = ("expires_s", "is_queued", "priority")

    def __init__(self, priority: int, expires_s: float):
        self.priority = priority
        self.expires_s = expires_s
        self.is_queued = False


class RetainedKeys:
    """Marks on keys; every operation O(1) or O(log n), amortised."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._marks: dict[PageKey, _Mark] = {}
        self._queue: list[tuple[float, int, PageKey]] = []
        """By time; a key's entry may be too early, then it is put in again."""
        self._num_queued = 0

    def __len__(self) -> int:
        return len(self._marks)

    def __bool__(self) -> bool:
        return bool(self._marks)

    def priority(self, key: PageKey) -> int:
        """What the key is worth; 0 unless somebody said otherwise."""
        mark = self._marks.get(key)
        return 0 if mark is None else mark.priority

    def has_end(self, key: PageKey) -> bool:
        """It leaves at some time."""
        mark = self._marks.get(key)
        return mark is not None and mark.expires_s < math.inf

    def is_over(self, key: PageKey) -> bool:
        """Its time is over."""
        mark = self._marks.get(key)
        return mark is not None and mark.expires_s <= self.now_s

    def ask(self, key: PageKey, retention: Retention, *, is_new: bool) -> None:
        """A request uses the key; `is_new`: nobody has, since it was last forgotten."""
        mark = self._marks.get(key)
        if is_new or mark is None:
            old_priority, old_end = 0, math.inf
        else:
            old_priority, old_end = mark.priority, mark.expires_s
        end = math.inf if retention.ttl_s is None else self.now_s + retention.ttl_s
        if not is_new:
            end = max(end, old_end)
        priority = retention.priority if is_new else max(retention.priority, old_priority)
        if priority == 0 and end == math.inf:
            self._marks.pop(key, None)
            return
        if mark is None:
            mark = self._marks[key] = _Mark(priority, end)
        mark.priority, mark.expires_s = priority, end
        self._enqueue(key, mark)

    def inherit(self, key: PageKey, parent: PageKey) -> None:
        """A key that nobody asked for stays as long, and is worth as much, as what it follows."""
        mark = self._marks.get(parent)
        if mark is not None:
            self._marks[key] = _Mark(mark.priority, mark.expires_s)
            self._enqueue(key, self._marks[key])

    def forget(self, key: PageKey) -> None:
        """Nothing holds the key any more."""
        self._marks.pop(key, None)

    @property
    def next_end_s(self) -> float | None:
        """No key's time is over before that, since `next_over` last gave none; `None`: never."""
        return self._queue[0][0] if self._marks and self._queue else None

    def next_over(self) -> PageKey | None:
        """Take out a key whose time is over and that was not given since; `None`: there is none.

        It stays marked.
        """
        while self._queue and self._queue[0][0] <= self.now_s:
            _, _, key = heapq.heappop(self._queue)
            mark = self._marks.get(key)
            if mark is None:
                continue
            mark.is_queued = False
            if mark.expires_s <= self.now_s:
                return key
            self._enqueue(key, mark)
        return None

    def _enqueue(self, key: PageKey, mark: _Mark) -> None:
        if mark.is_queued or mark.expires_s == math.inf:
            return
        if len(self._queue) > 2 * len(self._marks) + MIN_SWEPT:
            self._sweep()
        mark.is_queued = True
        self._num_queued += 1
        # Of equals the one that came last goes first: a request names its pages from the head on.
        heapq.heappush(self._queue, (mark.expires_s, -self._num_queued, key))

    def _sweep(self) -> None:
        """Keep the first entry of each marked key: a key forgotten and asked for anew has two."""
        latest_first = sorted(self._queue, reverse=True)
        kept = {entry[2]: entry for entry in latest_first if entry[2] in self._marks}
        self._queue = sorted(kept.values())
