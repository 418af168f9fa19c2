"""The one interface of the levels below the device: pages by key, batched, a miss is not an error.

A level that is slow, full, corrupt or gone means a miss, never a wrong answer and, but for `clear`,
never an exception: what went wrong is counted and logged. Keys name pages (see
`kvpaging.cache.prefix_key`), but are never trusted alone: a page comes back with its tokens, and
the caller compares them.

Knows nothing of the device, of page ids or of who may read what (the key says that).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from kvpaging.base.clock import Clock
from kvpaging.base.evictions import Evicted, EvictionCause
from kvpaging.base.ids import PageKey


class StoredPage(NamedTuple):
    """One full page, as it lies in any level."""

    key: PageKey
    parent: PageKey
    """The key of the page before it, or the chain's root."""
    tokens: bytes
    """Little-endian uint32 token ids, to be compared at a hit."""
    payload: bytes | memoryview
    """The page's span of the pool. Whoever keeps a page after the call copies this."""


class LevelStats(msgspec.Struct, frozen=True):
    """A level now, and its totals since it was opened."""

    num_pages: int | None
    """`None` where only a server knows."""
    num_bytes: int | None
    """Bytes that it occupies, everything included; never more than `capacity_bytes`."""
    capacity_bytes: int | None
    loads: int
    """Pages asked for; `hits` of them were answered."""
    hits: int
    stores: int
    """Pages brought; `stored` of them were new and were taken, `known` were there already."""
    stored: int
    known: int
    evicted: dict[str, int]
    """Pages that left, by `EvictionCause`; empty where only a server knows."""
    rescued: int
    """Pages that would have left and were kept, because they had been used."""
    refused: int
    """Pages not taken or not asked for: no room, too much in flight, the breaker is open."""
    late: int
    """Pages given up, at the deadline or because the medium failed."""
    corrupt: int
    """Pages whose bytes failed their check; each is a miss."""
    failures: int
    """Operations that the medium failed: input/output errors, a full disk, lost connections."""
    stored_payload_bytes: int
    """Bytes of the payloads that were stored ..."""
    written_bytes: int
    """... and what they came to, headers and compression included."""
    loaded_payload_bytes: int
    store_s: float
    load_s: float


class BelowStats(msgspec.Struct, frozen=True):
    """All levels below the device, and what is on its way to them."""

    levels: dict[str, LevelStats] = {}
    """The fastest first."""
    num_queued_bytes: int = 0
    """Copied out of the device's pages and not yet written."""
    num_dropped_pages: int = 0
    """That a level did not get, because its writing could not follow."""


class Level(Protocol):
    """A place for pages. Safe to call from several threads; no method raises but as it says.

    `deadline_s` is how many seconds from now the call may take. It is checked between pages, or
    between small batches of them, so that a call may overrun it by about one batch's checking.
    """

    @property
    def name(self) -> str:
        """`host`, `disk` or `remote`, as metrics and explanations call it."""

    def contains(self, keys: Sequence[PageKey]) -> list[bool]:
        """Which pages are believed to be here. Answers at once, from memory."""

    def load(self, keys: Sequence[PageKey], deadline_s: float) -> list[StoredPage | None]:
        """Each page, whole and checked, or `None`, in the order of `keys`.

        Whatever arrived in time is kept. A page found broken is forgotten.
        """

    def store(self, pages: Sequence[StoredPage], deadline_s: float) -> int:
        """Take copies of these pages; returns how many of them are here afterwards.

        A page that is here already is not written again, and counts as used. Bring parents before
        their children: what does not fit is left out from the end.
        """

    def touch(self, keys: Sequence[PageKey]) -> list[bool]:
        """These pages, the beginning of a chain, are used elsewhere: keep them as if loaded here.

        Returns which of them are here; of what would have to be asked for again, that it is.
        """

    def clear(self) -> None:
        """Forget every page. Raises whatever it likes where it may have some still."""

    def evicted(self, keys: Sequence[PageKey]) -> list[Evicted | None]:
        """How long ago and why each page left, of those whose leaving is remembered.

        It may be here again. Answers at once, from memory.
        """

    def stats(self) -> LevelStats:
        """State and totals. Cheap."""

    def close(self) -> None:
        """Let go of files and connections. Idempotent; afterwards everything is a miss."""


class Counters:
    """The totals of one level, counted from several threads."""

    _NAMES = tuple(
        name
        for name in LevelStats.__struct_fields__
        if name not in ("num_pages", "num_bytes", "capacity_bytes", "evicted")
    )

    def __init__(self) -> None:
        self._totals: dict[str, float] = dict.fromkeys(self._NAMES, 0)
        self._lock = threading.Lock()

    def add(self, **amounts: float) -> None:
        """Add to the totals of these names."""
        with self._lock:
            for name, amount in amounts.items():
                self._totals[name] += amount

    def stats(
        self,
        num_pages: int | None,
        num_bytes: int | None,
        capacity_bytes: int | None,
        evicted: Mapping[EvictionCause, int],
    ) -> LevelStats:
        """The totals with the state beside them."""
        with self._lock:
            totals = dict(self._totals)
        state = {
            "num_pages": num_pages,
            "num_bytes": num_bytes,
            "capacity_bytes": capacity_bytes,
            "evicted": {str(cause): count for cause, count in evicted.items()},
        }
        return msgspec.convert({**state, **totals}, LevelStats, strict=False)


class Complaints:
    """One log line a minute for each kind of trouble: a broken medium must not flood the log."""

    EVERY_S = 60.0

    def __init__(self, logger: logging.Logger, clock: Clock) -> None:
        self._logger = logger
        self._clock = clock
        self._next_s: dict[str, float] = {}

    def warn(self, kind: str, detail: object) -> None:
        """Log `kind: detail`, unless this kind was logged within the last minute."""
        now = self._clock()
        if now >= self._next_s.get(kind, now):
            self._next_s[kind] = now + self.EVERY_S
            self._logger.warning("%s: %s", kind, detail)
