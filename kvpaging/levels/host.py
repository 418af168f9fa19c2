"""Pages in this process's memory: the first level below the device.

Bounded in bytes; pages leave in the order of `chain_order`: the least recently used first, and a
chain loses its end before its beginning. Pages that leave go on their way to the next level, if
there is one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Final

from kvpaging.base.clock import Clock, monotonic
from kvpaging.base.errors import ConfigError
from kvpaging.base.evictions import Evicted, EvictionCause, EvictionLog
from kvpaging.base.ids import PageKey
from kvpaging.levels.chain_order import ChainOrder
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
        self._pages: dict[PageKey, StoredPage] = {}
        self._order = ChainOrder()
        """The keys of `_pages`, and while pages are stored theirs."""
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
            self._order.use(keys)
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
            self._order.add((page.key, page.parent) for page in wanted)
            for page in pages[len(wanted) :]:
                if page.key not in self._pages:
                    self._order.refuse(page.key)
            known = {page.key for page in wanted if page.key in self._pages}
            coming = (page for page in wanted if page.key not in known and page.key in self._order)
            new = {page.key: page for page in coming}
            evicted = self._make_room(new)
            num_new = len(new)
            known &= self._pages.keys()
            stored: list[StoredPage] = []
            try:
                for page in new.values():
                    if self._clock() - started >= deadline_s:
                        break
                    self._pages[page.key] = page._replace(payload=bytes(page.payload))
                    self._num_bytes += _num_bytes(page)
                    stored.append(page)
            finally:
                for page in list(new.values())[len(stored) :]:
                    self._order.remove(page.key)
        payload_bytes = sum(len(page.payload) for page in stored)
        self._counters.add(
            stores=len(pages),
            stored=len(stored),
            known=len(known),
            refused=len(pages) - len(known) - num_new,
            late=num_new - len(stored),
            stored_payload_bytes=payload_bytes,
            written_bytes=payload_bytes,
            store_s=self._clock() - started,
        )
        if evicted and self._overflow is not None:
            evicted.reverse()  # parents first
            self._overflow.put(evicted)
        return len(known) + len(stored)

    def touch(self, keys: Sequence[PageKey]) -> list[bool]:
        """These pages are used; which of them are here, or found no room lately."""
        with self._lock:
            self._order.use(keys)
            return [key in self._pages or self._order.was_refused(key) for key in keys]

    def clear(self) -> None:
        """Forget every page."""
        with self._lock:
            self._note_evicted(self._pages, EvictionCause.FLUSH)
            self._pages.clear()
            self._order.clear()
            self._num_bytes = 0

    def evicted(self, keys: Sequence[PageKey]) -> list[Evicted | None]:
        """How long ago and why each page left; of the last ones."""
        return self._evictions.ages(keys, self._clock())

    def stats(self) -> LevelStats:
        """State and totals."""
        with self._lock:
            num_pages, num_bytes = len(self._pages), self._num_bytes
        return self._counters.stats(
            num_pages, num_bytes, self._capacity_bytes, self._evictions.counts
        )

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

    def _make_room(self, coming: dict[PageKey, StoredPage]) -> list[StoredPage]:
        """Let pages go until these fit; those that went, in order.

        Where one of them would be the next to go, it is taken out: it finds no room.
        """
        evicted: list[StoredPage] = []
        num_bytes = self._num_bytes + sum(map(_num_bytes, coming.values()))
        while num_bytes > self._capacity_bytes and (key := self._order.first) is not None:
            page = self._pages.pop(key, None)
            if page is None:
                self._order.refuse(key)
                num_bytes -= _num_bytes(coming.pop(key))
                continue
            self._order.remove(key)
            num_bytes -= _num_bytes(page)
            self._num_bytes -= _num_bytes(page)
            evicted.append(page)
        self._note_evicted((page.key for page in evicted), EvictionCause.ROOM)
        return evicted

    def _note_evicted(self, keys: Iterable[PageKey], cause: EvictionCause) -> None:
        self._evictions.now_s = self._clock()
        for key in keys:
            self._evictions.add(key, cause)
