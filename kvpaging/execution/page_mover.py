"""Moves pages between the pool and the levels below, beside the steps.

    stores   copied out of the pool at the beginning of their step, written by a thread of their own
    loads    fetched by another thread, checked, written into pages that nobody else touches yet

What a slow level held is also stored in those above it that take pages at their first use.

A level that is slow, full or gone costs the load that asked it, and no step waits for one. Policy
(which page, when) is in `kvpaging.cache` and `kvpaging.scheduling`; bytes on disk and on the wire
are in `kvpaging.levels`.
"""

from __future__ import annotations

import logging
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Final, NamedTuple

from kernels.ops import Ops
from kvpaging.base.clock import Clock, monotonic
from kvpaging.base.evictions import Evicted
from kvpaging.base.ids import PageKey
from kvpaging.base.threads import give_way
from kvpaging.cache.lower_levels import (
    Held,
    LevelFlush,
    LevelLoad,
    LevelsFlushed,
    PageLoad,
    PagesLoaded,
    PageStore,
)
from kvpaging.cache.prefix_key import ChainLink
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.page_swaps import PagesOut, PageSwaps
from kvpaging.execution.transfer import use_device
from kvpaging.levels.level import BelowStats, Complaints, Level, StoredPage
from kvpaging.levels.overflow import Overflow

_logger = logging.getLogger(__name__)

BATCH_PAGES: Final = 32
"""Pages asked of a level at a time: what arrived before a miss or a deadline is kept."""
STORE_DEADLINE_S: Final = 10.0
STEP_BYTES: Final = 16 * 1024 * 1024
"""Copied out of the pool in one step, of what does not leave it."""
MAX_QUEUED_BYTES: Final = 512 * 1024 * 1024
"""Copied out of the pool and not yet written; pages beyond that are not kept."""
CLOSE_S: Final = 8.0
"""At the end what is on its way is written for at most so long; `server.supervisor` waits longer.
"""


@dataclass(frozen=True, slots=True)
class LevelSetting:
    """One level, and what goes there."""

    level: Level
    min_uses: int | None
    """Takes pages once so many sequences have used them; 0: when they leave the device; `None`:
    nothing from the device, the level above it feeds it."""
    deadline_s: float
    """For one batch of a load."""
    overflow: Overflow | None = None
    """Where what leaves it for lack of room is on its way to the next level."""


@dataclass(slots=True)
class _Fetch:
    """A load under way. `lock` keeps a late thread from writing into pages given up."""

    load: PageLoad
    begun_s: float
    """When it was ordered; it is given up a while after that."""
    num_flushes: int
    """That were ordered before it."""
    ended_s: float = 0.0
    num_done: int = 0
    asked: tuple[str, int, float] | None = None
    """The level that works on it: its name, the pages it was asked for, since when."""
    levels: dict[str, LevelLoad] = field(default_factory=dict)
    """What each level did for it so far."""
    is_over: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, num_loaded: int, now: float) -> None:
        """The level that was asked is done, or given up. The caller holds the lock."""
        if self.asked is None:
            return
        name, num_asked, since_s = self.asked
        before = self.levels.get(name, LevelLoad(name, 0, 0, 0.0))
        self.levels[name] = LevelLoad(
            name,
            before.num_asked + num_asked,
            before.num_loaded + num_loaded,
            before.elapsed_s + now - since_s,
        )
        self.asked = None


class _StoreOrder(NamedTuple):
    """Pages, and the levels that take them."""

    pages: list[StoredPage]
    takers: tuple[LevelSetting, ...]
    coming: PagesOut | None = None
    """What the pages' payloads must wait for."""


class PageMover:
    """The levels below the pool: a `lower_levels.LowerLevels` that also carries the orders out.

    `settings` come fastest level first. Orders come from the thread that runs the steps, questions
    from the engine's, which may be another. Owns two threads and the levels.
    """

    def __init__(
        self,
        pool: KVPool,
        ops: Ops,
        settings: Sequence[LevelSetting],
        *,
        give_up_s: float = 5.0,
        clock: Clock = monotonic,
    ) -> None:
        self._swaps = PageSwaps(pool, ops)
        self._device = pool.pages.device
        self._page_bytes = pool.spec.page_bytes
        self._settings = tuple(settings)
        self._overflows = [s.overflow for s in settings if s.overflow is not None]
        self._give_up_s = give_up_s
        self._clock = clock
        self._fetches: deque[_Fetch] = deque()
        self._stores: queue.SimpleQueue[_StoreOrder | LevelFlush | None] = queue.SimpleQueue()
        self._loads: queue.SimpleQueue[_Fetch | None] = queue.SimpleQueue()
        self._complaints = Complaints(_logger, clock)
        self.num_queued_bytes = 0
        """Copied out of the pool and not yet written."""
        self._queued_lock = threading.Lock()
        self._news = threading.Event()
        self._flush_lock = threading.Lock()
        self._num_flushes = 0
        self._flushed: queue.SimpleQueue[LevelsFlushed] = queue.SimpleQueue()
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
    def names(self) -> tuple[str, ...]:
        """The levels, the fastest first."""
        return tuple(setting.level.name for setting in self._settings)

    @property
    def store_at_uses(self) -> tuple[int, ...]:
        """Numbers of uses at which some level takes a page."""
        return tuple(sorted({setting.min_uses for setting in self._settings if setting.min_uses}))

    @property
    def wants_evicted(self) -> bool:
        """Some level takes what leaves the device."""
        return any(setting.min_uses == 0 for setting in self._settings)

    def num_storable(self) -> int:
        """Pages that are no burden to one step, as long as writing follows."""
        num_bytes = MAX_QUEUED_BYTES - self.num_queued_bytes
        if num_bytes >= self._page_bytes > STEP_BYTES:
            return 1
        return min(num_bytes, STEP_BYTES) // self._page_bytes

    def probe(self, links: Sequence[ChainLink]) -> tuple[Held, ...]:
        """Which of these pages are believed to be below, as `LowerLevels.probe` says."""
        keys = [link.key for link in links]
        answers = [setting.level.contains(keys) for setting in self._settings] if keys else []
        names = self.names
        held: list[Held] = []
        for found in zip(*answers, strict=True):
            if True not in found:
                break
            name = names[found.index(True)]
            num_before = 0
            if held and held[-1].level == name:
                num_before = held.pop().num_pages
            held.append(Held(name, num_before + 1))
        return tuple(held)

    def evicted(self, keys: Sequence[PageKey]) -> dict[str, list[Evicted | None]]:
        """By level, how long ago and why each page left it."""
        levels = (setting.level for setting in self._settings)
        return {level.name: level.evicted(keys) for level in levels}

    def stats(self) -> BelowStats:
        """Each level's state and totals, and what is on its way."""
        return BelowStats(
            {setting.level.name: setting.level.stats() for setting in self._settings},
            self.num_queued_bytes + sum(way.num_bytes for way in self._overflows),
            self.num_dropped_stores + sum(way.num_dropped_pages for way in self._overflows),
        )

    # What a plan orders.

    def store(self, stores: Sequence[PageStore]) -> None:
        """Copy the pages out of the pool now, and write them down some time."""
        for num_uses, orders in groupby(stores, lambda store: store.num_uses):
            takers = tuple(s for s in self._settings if _takes(s, num_uses))
            kept = [order for order in orders if takers and self._has_room()]
            if kept:
                coming = self._swaps.take_out([order.page_id for order in kept])
                pages = [
                    StoredPage(order.link.key, order.parent, order.link.tokens, payload)
                    for order, payload in zip(kept, coming.payloads, strict=True)
                ]
                self._stores.put(_StoreOrder(pages, takers, coming))

    def begin(self, load: PageLoad) -> None:
        """Begin a load; `completions` tells its end."""
        fetch = _Fetch(load, self._clock(), self._num_flushes)
        self._fetches.append(fetch)
        self._loads.put(fetch)

    def flush(self, order: LevelFlush) -> None:
        """Empty levels when what was ordered before is written; `completions` tells the end."""
        with self._flush_lock:
            self._num_flushes += 1
            self._stores.put(order)

    def completions(self) -> tuple[PagesLoaded | LevelsFlushed, ...]:
        """What ended since the last call; loads that took too long are given up."""
        self._news.clear()
        now = self._clock()
        ended: list[PagesLoaded | LevelsFlushed] = []
        while not self._flushed.empty():
            ended.append(self._flushed.get())
        for fetch in self._fetches.copy():
            # Asked before the lock is: that thread may be writing pages, and no step waits for it.
            if not fetch.is_over and now - fetch.begun_s < self._give_up_s:
                continue
            with fetch.lock:
                fetch.note(0, now)
                elapsed_s = (fetch.ended_s if fetch.is_over else now) - fetch.begun_s
                fetch.is_over = True
            self._fetches.remove(fetch)
            levels = tuple(fetch.levels.values())
            ended.append(PagesLoaded(fetch.load.seq_id, fetch.num_done, elapsed_s, levels))
        return tuple(ended)

    def wait(self, timeout_s: float) -> None:
        """Wait until a load has ended, at most so long."""
        self._news.wait(timeout_s)

    def close(self) -> None:
        """Write what is still to be written, for at most `CLOSE_S`, and close the levels."""
        end_s = monotonic() + CLOSE_S
        for fetch in self._fetches:
            fetch.is_over = True  # nobody waits for it any more
        self._stores.put(None)
        self._loads.put(None)
        for thread in self._threads:
            thread.join(max(0.0, end_s - monotonic()))
        for way in self._overflows:
            way.finish(max(0.0, end_s - monotonic()))
        if num_bytes := self.stats().num_queued_bytes:
            _logger.warning("%d bytes of pages are not kept: there was no time to write", num_bytes)
        for way in self._overflows:
            way.close()
        for setting in self._settings:
            setting.level.close()

    # The threads.

    def _run_stores(self) -> None:
        give_way()
        use_device(self._device)
        while (order := self._stores.get()) is not None:
            if isinstance(order, LevelFlush):
                self._flush(order)
                continue
            if order.coming is not None:
                order.coming.wait()
            for setting in order.takers:
                self._guarded(partial(setting.level.store, order.pages, STORE_DEADLINE_S))
            with self._queued_lock:
                self.num_queued_bytes -= self._page_bytes * len(order.pages)

    def _flush(self, order: LevelFlush) -> None:
        pages: dict[str, int | None] = {}

        def empty(level: Level) -> None:
            num_pages = level.stats().num_pages
            level.clear()
            pages[level.name] = num_pages

        for way in self._overflows:
            self._guarded(way.drop)
        levels = [s.level for s in self._settings if s.level.name in order.levels]
        failed = [each.name for each in levels if not self._guarded(partial(empty, each))]
        self._flushed.put(LevelsFlushed(order.query_id, pages, tuple(failed)))
        self._news.set()

    def _run_loads(self) -> None:
        use_device(self._device)
        while (fetch := self._loads.get()) is not None:
            self._guarded(partial(self._fetch, fetch))
            with fetch.lock:
                fetch.ended_s = self._clock()
                fetch.note(0, fetch.ended_s)
                fetch.is_over = True
            self._news.set()

    def _fetch(self, fetch: _Fetch) -> None:
        links = fetch.load.links
        for first in range(0, len(links), BATCH_PAGES):
            if fetch.is_over:
                return  # given up while it waited, or while the last batch was on its way
            wanted = links[first : first + BATCH_PAGES]
            pages = self._find(wanted, fetch)
            page_ids = fetch.load.page_ids[first : first + len(pages)]
            with fetch.lock:
                if fetch.is_over:
                    return
                self._swaps.put_in(page_ids, [page.payload for page in pages])
                fetch.num_done += len(pages)
            if len(pages) < len(wanted):
                return

    def _find(self, links: Sequence[ChainLink], fetch: _Fetch) -> list[StoredPage]:
        """The pages of these links, from the first on, each from the fastest level that has it."""
        found: list[StoredPage | None] = [None] * len(links)
        for i, setting in enumerate(self._settings):
            missing = [k for k, page in enumerate(found) if page is None]
            if not missing:
                break
            came = self._ask(setting, [links[k] for k in missing], fetch)
            for k, page in zip(missing, came, strict=True):
                found[k] = page
            self._promote([page for page in came if page is not None], self._settings[:i], fetch)
        pages: list[StoredPage] = []
        for page in found:
            if page is None:
                break
            pages.append(page)
        return pages

    def _ask(
        self, setting: LevelSetting, links: Sequence[ChainLink], fetch: _Fetch
    ) -> list[StoredPage | None]:
        """What one level has of these links. A key is never trusted alone, a level not at all."""
        keys = [link.key for link in links]
        believed = [i for i, here in enumerate(setting.level.contains(keys)) if here]
        came: list[StoredPage | None] = [None] * len(links)
        if not believed:
            return came
        with fetch.lock:
            fetch.asked = (setting.level.name, len(believed), self._clock())
        loaded = setting.level.load([keys[i] for i in believed], setting.deadline_s)
        for i, page in zip(believed, loaded, strict=True):
            if page is not None and self._is_page_of(page, links[i]):
                came[i] = page
        with fetch.lock:
            fetch.note(sum(page is not None for page in came), self._clock())
        return came

    def _promote(
        self, pages: list[StoredPage], above: Sequence[LevelSetting], fetch: _Fetch
    ) -> None:
        """Keep what came from far away nearer: it was used before, and is again.

        Not what was read before a flush: it would come back there.
        """
        takers = tuple(setting for setting in above if setting.min_uses == 1)
        kept = [page for page in pages if takers and self._has_room()]
        with self._flush_lock:
            if kept and fetch.num_flushes == self._num_flushes:
                self._stores.put(_StoreOrder(kept, takers))
                kept = []
        with self._queued_lock:
            self.num_queued_bytes -= self._page_bytes * len(kept)

    def _is_page_of(self, page: StoredPage, link: ChainLink) -> bool:
        return (
            page.key == link.key
            and page.tokens == link.tokens
            and len(page.payload) == self._page_bytes
        )

    def _guarded(self, work: Callable[[], object]) -> bool:
        """Whether it worked. A level's bug must not end its thread: it is misses, and a line."""
        try:
            work()
            return True
        except Exception as error:  # noqa: BLE001 - whatever it was, it is a miss
            where = traceback.extract_tb(error.__traceback__)[-1]
            detail = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
            self._complaints.warn("a level failed", detail)
            return False

    def _has_room(self) -> bool:
        with self._queued_lock:
            if self.num_queued_bytes + self._page_bytes > MAX_QUEUED_BYTES:
                self.num_dropped_stores += 1
                self._complaints.warn("pages are not kept", "the levels below write too slowly")
                return False
            self.num_queued_bytes += self._page_bytes
            return True


def _takes(setting: LevelSetting, num_uses: int) -> bool:
    """Whether the level takes a page of the device's after so many uses; 0: as it leaves."""
    if setting.min_uses is None or not num_uses:
        return setting.min_uses == num_uses
    return 0 < setting.min_uses <= num_uses
