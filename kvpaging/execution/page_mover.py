"""Moves pages between the pool and the levels below, beside the steps.

    stores   copied out of the pool at the beginning of their step, written by a thread of their own
    loads    fetched by another thread, checked, written into pages that nobody else touches yet

A level that is slow, full or gone costs the load that asked it, and no step waits for one. Policy
(which page, when) is in `kvpaging.cache` and `kvpaging.scheduling`; bytes on disk and on the wire
are in `kvpaging.levels`.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from kvpaging.base.clock import Clock, monotonic
from kvpaging.cache.lower_levels import PageLoad, PagesLoaded, PageStore
from kvpaging.cache.prefix_key import ChainLink
from kvpaging.execution.kv_pool import KVPool
from kvpaging.levels.level import Complaints, Level, LevelStats, StoredPage

_logger = logging.getLogger(__name__)

BATCH_PAGES: Final = 32
"""Pages asked of a level at a time: what arrived before a miss or a deadline is kept."""
STORE_DEADLINE_S: Final = 10.0
MAX_QUEUED_BYTES: Final = 512 * 1024 * 1024
"""Copied out of the pool and not yet written; pages beyond that are not kept."""


@dataclass(frozen=True, slots=True)
class LevelSetting:
    """One level, and what goes there."""

    level: Level
    is_write_through: bool
    """Takes pages as they are computed; else when they leave the device."""
    deadline_s: float
    """For one batch of a load."""
    is_local: bool = True
    """It knows at once, without asking anybody, which pages it has."""


@dataclass(slots=True)
class _Fetch:
    """A load under way. `lock` keeps a late thread from writing into pages given up."""

    load: PageLoad
    begun_s: float
    """When it was ordered; it is given up a while after that."""
    started_s: float = 0.0
    """When the thread took it up: what it waited for others says nothing of a level's speed."""
    ended_s: float = 0.0
    num_done: int = 0
    is_over: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class PageMover:
    """The levels below the pool: a `lower_levels.LowerLevels` that also carries the orders out.

    `settings` come fastest level first. Called from the engine's thread; owns two threads and the
    levels.
    """

    def __init__(
        self,
        pool: KVPool,
        settings: Sequence[LevelSetting],
        *,
        give_up_s: float = 5.0,
        clock: Clock = monotonic,
    ) -> None:
        self._pool = pool
        self._page_bytes = pool.spec.page_bytes
        self._settings = tuple(settings)
        self._give_up_s = give_up_s
        self._clock = clock
        self._fetches: deque[_Fetch] = deque()
        self._stores: queue.SimpleQueue[tuple[bool, list[StoredPage]] | None] = queue.SimpleQueue()
        self._loads: queue.SimpleQueue[_Fetch | None] = queue.SimpleQueue()
        self._complaints = Complaints(_logger, clock)
        self.num_queued_bytes = 0
        """Copied out of the pool and not yet written."""
        self._queued_lock = threading.Lock()
        self._news = threading.Event()
        self.num_dropped_stores = 0
        """Pages not kept because writing could not follow."""
        self._threads = [
            threading.Thread(target=self._run_stores, name="page stores", daemon=True),
            threading.Thread(target=self._run_loads, name="page loads", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # What policy asks.

    @property
    def wants_computed(self) -> bool:
        """Some level is written through."""
        return any(setting.is_write_through for setting in self._settings)

    @property
    def wants_evicted(self) -> bool:
        """Some level takes what leaves the device."""
        return any(not setting.is_write_through for setting in self._settings)

    def probe(self, links: Sequence[ChainLink]) -> int:
        """How many of these pages, from the first on, some level believes to have."""
        if not links:
            return 0
        if not all(setting.is_local for setting in self._settings):
            return len(links)  # maybe: only the try will tell, and it ends at the first miss
        keys = [link.key for link in links]
        answers = [setting.level.contains(keys) for setting in self._settings]
        for i, found in enumerate(zip(*answers, strict=True)):
            if not any(found):
                return i
        return len(keys)

    def stats(self) -> dict[str, LevelStats]:
        """Each level's state and totals, by name."""
        return {setting.level.name: setting.level.stats() for setting in self._settings}

    # What a plan orders.

    def store(self, stores: Sequence[PageStore]) -> None:
        """Copy the pages out of the pool now, and write them down some time."""
        for is_eviction in (False, True):
            pages = [
                StoredPage(s.link.key, s.parent, s.link.tokens, self._pool.read_page(s.page_id))
                for s in stores
                if s.is_eviction is is_eviction and self._has_room()
            ]
            if pages:
                self._stores.put((is_eviction, pages))

    def begin(self, load: PageLoad) -> None:
        """Begin a load; `completions` tells its end."""
        fetch = _Fetch(load, self._clock())
        self._fetches.append(fetch)
        self._loads.put(fetch)

    def completions(self) -> tuple[PagesLoaded, ...]:
        """Loads that ended since the last call, and those given up because they took too long."""
        self._news.clear()
        now = self._clock()
        ended: list[PagesLoaded] = []
        for fetch in tuple(self._fetches):
            with fetch.lock:
                if not fetch.is_over and now - fetch.begun_s < self._give_up_s:
                    continue
                elapsed_s = fetch.ended_s - fetch.started_s if fetch.is_over else self._give_up_s
                fetch.is_over = True
            self._fetches.remove(fetch)
            ended.append(PagesLoaded(fetch.load.seq_id, fetch.num_done, elapsed_s))
        return tuple(ended)

    def wait(self, timeout_s: float) -> None:
        """Wait until a load has ended, at most so long."""
        self._news.wait(timeout_s)

    def close(self) -> None:
        """Write what is still to be written, within a bound, and close the levels."""
        self._stores.put(None)
        self._loads.put(None)
        for thread in self._threads:
            thread.join(STORE_DEADLINE_S)
        for setting in self._settings:
            setting.level.close()

    # The threads.

    def _run_stores(self) -> None:
        while (order := self._stores.get()) is not None:
            is_eviction, pages = order
            for setting in self._settings:
                if setting.is_write_through is not is_eviction:
                    _guarded(partial(setting.level.store, pages, STORE_DEADLINE_S))
            with self._queued_lock:
                self.num_queued_bytes -= self._page_bytes * len(pages)

    def _run_loads(self) -> None:
        while (fetch := self._loads.get()) is not None:
            fetch.started_s = self._clock()
            _guarded(partial(self._fetch, fetch))
            with fetch.lock:
                fetch.is_over = True
                fetch.ended_s = self._clock()
            self._news.set()

    def _fetch(self, fetch: _Fetch) -> None:
        links = fetch.load.links
        for first in range(0, len(links), BATCH_PAGES):
            if fetch.is_over:
                return  # given up while it waited, or while the last batch was on its way
            wanted = links[first : first + BATCH_PAGES]
            pages = self._find(wanted)
            for page_id, page in zip(fetch.load.page_ids[first:], pages, strict=False):
                with fetch.lock:
                    if fetch.is_over:
                        return
                    self._pool.write_page(page_id, page.payload)
                    fetch.num_done += 1
            if len(pages) < len(wanted):
                return

    def _find(self, links: Sequence[ChainLink]) -> list[StoredPage]:
        """The pages of these links, from the first on, each from the fastest level that has it."""
        found: list[StoredPage | None] = [None] * len(links)
        for setting in self._settings:
            missing = [i for i, page in enumerate(found) if page is None]
            if not missing:
                break
            loaded = setting.level.load([links[i].key for i in missing], setting.deadline_s)
            for i, page in zip(missing, loaded, strict=True):
                # A key is never trusted alone, and a level not at all.
                if page is not None and self._is_page_of(page, links[i]):
                    found[i] = page
        pages: list[StoredPage] = []
        for page in found:
            if page is None:
                break
            pages.append(page)
        return pages

    def _is_page_of(self, page: StoredPage, link: ChainLink) -> bool:
        return (
            page.key == link.key
            and page.tokens == link.tokens
            and len(page.payload) == self._page_bytes
        )

    def _has_room(self) -> bool:
        with self._queued_lock:
            if self.num_queued_bytes + self._page_bytes > MAX_QUEUED_BYTES:
                self.num_dropped_stores += 1
                self._complaints.warn("pages are not kept", "the levels below write too slowly")
                return False
            self.num_queued_bytes += self._page_bytes
            return True


def _guarded(work: Callable[[], object]) -> None:
    """A level's bug must not end its thread: it means misses, and a line that says so."""
    try:
        work()
    except Exception:  # whatever it was, it is a miss, and never a stuck request
        _logger.exception("a level failed")
