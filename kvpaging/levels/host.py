"""Pages in this process's memory: the first level below the device.

Bounded in bytes, the least recently used page leaves first. Within one call the last page is the
least recently used one, so that a chain loses its end before its beginning. Pages that leave go on
their way to the next level, if there is one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

from kvpaging.base.clock import Clock, monotonic
from kvpaging.base.errors import ConfigError
from kvpaging.base.evictions import Evicted, EvictionCause, EvictionLog
from kvpaging.base.ids import PageKey
from kvpaging.levels.level import Counters, LevelStats, StoredPage
from kvpaging.levels.overflow import Overflow

_ENTRY_BYTES: Final = 512
"""What Python's objects cost a page beside their contents, rounded up."""


def _num_bytes(page: StoredPage) -> int:
    return len(page.payload) + len(page.tokens) + _ENTRY_BYTES


class HostLevel:
    """At most `capacity_bytes` of pages; a `level.Level`. Raises ConfigError without any."""

    name = "host"

    def __init__(
        self, capacity_bytes: int, *, overflow: Overflow | None = None, clock: Clock = monotonic
    ) -> None:
        if capacity_bytes < 1:
            raise ConfigError(f"the host cache's size is {capacity_bytes} bytes; give at least 1")
        self._capacity_bytes = capacity_bytes
        self._overflow = overflow
        self._clock = clock
        self._pages: OrderedDict[PageKey, StoredPage] = OrderedDict()
        self._num_bytes = 0
        self._is_closed = False
        self._counters = Counters()
        self._evictions = EvictionLog()
        self._lock = threading.Lock()

    def contains(self, keys: Sequence[PageKey]) -> list[bool]:
        """Which pages are here. Does not count as use."""
        return [key in self._pages for key in keys]

    def load(self, keys: Sequence[PageKey], deadline_s: float) -> list[StoredPage | None]:
        """The pages themselves: their payloads are read-only bytes. Never late."""
        started = self._clock()
        with self._lock:
            found = [self._pages.get(key) for key in keys]
            self._touch(keys)
        hits = [page for page in found if page is not None]
        self._counters.add(
            loads=len(keys),
            hits=len(hits),
            loaded_payload_bytes=sum(len(page.payload) for page in hits),
            load_s=self._clock() - started,
        )
        return found

    def store(self, pages: Sequence[StoredPage], deadline_s: float) -> int:
        """Copy the pages in, after letting others go. What is left at the deadline is not taken."""
        started = self._clock()
        with self._lock:
            wanted = self._fitting(pages)
            new = [page for page in wanted if page.key not in self._pages]
            self._touch([page.key for page in wanted])  # what is here must not leave to make room
            evicted = self._make_room(sum(map(_num_bytes, new)))
            stored = 0
            for page in new:
                if self._clock() - started >= deadline_s:
                    break
                self._pages[page.key] = page._replace(payload=bytes(page.payload))
                self._num_bytes += _num_bytes(page)
                stored += 1
            self._touch([page.key for page in wanted])
        payload_bytes = sum(len(page.payload) for page in new[:stored])
        known = len(wanted) - len(new)
        self._counters.add(
            stores=len(pages),
            stored=stored,
            known=known,
            refused=len(pages) - len(wanted),
            late=len(new) - stored,
            evicted=len(evicted),
            stored_payload_bytes=payload_bytes,
            written_bytes=payload_bytes,
            store_s=self._clock() - started,
        )
        if evicted and self._overflow is not None:
            evicted.reverse()  # parents first
            self._overflow.put(evicted)
        return known + stored

    def clear(self) -> None:
        """Forget every page."""
        with self._lock:
            self._note_evicted(self._pages, EvictionCause.FLUSH)
            self._pages.clear()
            self._num_bytes = 0

    def evicted(self, keys: Sequence[PageKey]) -> list[Evicted | None]:
        """How long ago and why each page left; of the last ones."""
        return self._evictions.ages(keys, self._clock())

    def stats(self) -> LevelStats:
        """State and totals."""
        with self._lock:
            num_pages, num_bytes = len(self._pages), self._num_bytes
        return self._counters.stats(num_pages, num_bytes, self._capacity_bytes)

    def close(self) -> None:
        """Give the memory back."""
        with self._lock:
            self._is_closed = True
        self.clear()

    def _fitting(self, pages: Sequence[StoredPage]) -> list[StoredPage]:
        """The pages that fit here together, from the first on."""
        if self._is_closed:
            return []
        room = self._capacity_bytes
        for i, page in enumerate(pages):
            room -= _num_bytes(page)
            if room < 0:
                return list(pages[:i])
        return list(pages)

    def _touch(self, keys: Sequence[PageKey]) -> None:
        """Make these the most recently used ones, the first of them most of all."""
        for key in reversed(keys):
            if key in self._pages:
                self._pages.move_to_end(key)

    def _make_room(self, num_bytes: int) -> list[StoredPage]:
        """Let the least recently used pages go until so much fits; those that went, in order."""
        evicted = []
        while self._num_bytes + num_bytes > self._capacity_bytes:
            _, page = self._pages.popitem(last=False)
            self._num_bytes -= _num_bytes(page)
            evicted.append(page)
        self._note_evicted((page.key for page in evicted), EvictionCause.ROOM)
        return evicted

    def _note_evicted(self, keys: Iterable[PageKey], cause: EvictionCause) -> None:
        self._evictions.now_s = self._clock()
        for key in keys:
            self._evictions.add(key, cause)
