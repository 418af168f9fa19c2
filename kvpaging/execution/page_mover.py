"""Moves pages between the pool and the levels below, beside the steps.

    stores   copied out of the pool at the beginning of their step; each level has a thread that
             writes those it takes
    loads    passed from level to level, each of which has a thread that reads; checked, written
             into pages that nobody else touches yet

So a slow level holds up no other one. What it held is also stored in those above it that take pages
at their first use.

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
from itertools import groupby, takewhile
from typing import Final

from kernels.ops import Ops
from kvpaging.base.clock import Clock, monotonic
from kvpaging.base.evictions import Evicted
from kvpaging.base.ids import PageKey
from kvpaging.base.threads import give_way
from kvpaging.cache.lower_levels import (
    GUESSING,
    Held,
    LevelFlush,
    LevelLoad,
    LevelsFlushed,
    PageLoad,
    PagesLoaded,
    PagesLost,
    PageStore,
    PageTouch,
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
"""Copied out of the pool and not yet written, in all. Each level that takes pages from there has an
equal share; those beyond that it does not get."""
MAX_QUEUED_TOUCHES: Final = 65_536
"""Pages used again that one level has still to hear of; of more it does not hear."""
CLOSE_S: Final = 4.0
"""At the end what is on its way is written for at most so long. This, `WAYS_CLOSE_S` and what a
disk level may take to close are less than `server.supervisor` waits."""
WAYS_CLOSE_S: Final = 0.5
"""Then all ways between levels are waited for so long: the level below may hold one for a batch."""


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
    other_roots: tuple[PageKey, ...] = ()
    """Of other numerics identities whose pages were there when it was opened."""


@dataclass(slots=True)
class _Fetch:
    """A load under way. `lock` keeps a late thread from writing into pages given up."""

    load: PageLoad
    begun_s: float
    """When it was ordered; it is given up a while after that."""
    num_flushes: int
    """That were ordered before it."""
    found: list[StoredPage | None]
    """Of the pages that are asked for now, those that came so far."""
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


@dataclass(slots=True)
class _StoreOrder:
    """Pages in one piece of memory, for all levels that take them."""

    pages: list[StoredPage]
    num_bytes: int
    num_takers: int
    """That have not stored them yet."""
    coming: PagesOut | None = None
    """What the pages' payloads must wait for."""


@dataclass(slots=True, eq=False)
class _Lane:
    """One level and the work that waits for it. A barrier is where lanes meet to be emptied."""

    setting: LevelSetting
    stores: queue.SimpleQueue[_StoreOrder | PageTouch | threading.Barrier | None] = field(
        default_factory=queue.SimpleQueue
    )
    loads: queue.SimpleQueue[_Fetch | None] = field(default_factory=queue.SimpleQueue)
    num_queued_bytes: int = 0
    """Of the orders in `stores`, the one it works on included."""
    num_queued_touches: int = 0
    """Pages of the touches in `stores`, likewise."""

    @property
    def level(self) -> Level:
        return self.setting.level

    def takes(self, num_uses: int) -> bool:
        """Whether the level takes a page of the device's after so many uses; 0: as it leaves."""
        min_uses = self.setting.min_uses
        if min_uses is None or not num_uses:
            return min_uses == num_uses
        return 0 < min_uses <= num_uses


class PageMover:
    """The levels below the pool: a `lower_levels.LowerLevels` that also carries the orders out.

    `settings` come fastest level first. Orders come from the thread that runs the steps, questions
    from the engine's, which may be another. Owns the levels, and two threads for each.
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
        self.other_roots = tuple(root for setting in settings for root in setting.other_roots)
        """Of other numerics identities whose pages were in the levels when they were opened."""
        self._give_up_s = give_up_s
        self._clock = clock
        self._lanes = [_Lane(setting) for setting in settings]
        self._num_fed = sum(setting.min_uses is not None for setting in settings)
        self._fetches: deque[_Fetch] = deque()
        self._complaints = Complaints(_logger, clock)
        self.num_queued_bytes = 0
        """Copied out of the pool and not yet written by all that take it."""
        self._queued_lock = threading.Lock()
        self._news = threading.Event()
        self._flush_lock = threading.Lock()
        self._num_flushes = 0
        self._lost: queue.SimpleQueue[PagesLost] = queue.SimpleQueue()
        self._flushed: queue.SimpleQueue[LevelsFlushed] = queue.SimpleQueue()
        self.num_dropped_stores = 0
        """Pages that a level did not get because its writing could not follow."""
        self._threads = [
            threading.Thread(
                target=run, args=(lane,), name=f"{what} {lane.level.name}", daemon=True
            )
            for lane in self._lanes
            for run, what in ((self._run_stores, "stores in"), (self._run_loads, "loads from"))
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
        """Pages that are no burden to one step, as long as some level's writing follows."""
        rooms = (self._num_free_bytes(lane) for lane in self._lanes if lane.setting.min_uses)
        num_bytes = max(rooms, default=0)
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

    def holder(self, key: PageKey) -> str | None:
        """The fastest level that knows to have this page."""
        levels = (setting.level for setting in self._settings)
        known = (level for level in levels if level.name not in GUESSING)
        return next((level.name for level in known if level.contains([key])[0]), None)

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
        with_takers = [(order, self._takers(order.num_uses)) for order in stores]
        # Each memory is of pages that the same levels take: none is kept for one page in it.
        for takers, group in groupby(with_takers, lambda one: one[1]):
            if takers:
                orders = [order for order, _ in group]
                coming = self._swaps.take_out([order.page_id for order in orders])
                pages = [
                    StoredPage(order.link.key, order.parent, order.link.tokens, payload)
                    for order, payload in zip(orders, coming.payloads, strict=True)
                ]
                self._queue(pages, takers, coming)

    def touch(self, touches: Sequence[PageTouch]) -> None:
        """Tell levels that take pages at their use what is used again, beside the steps.

        One that takes what leaves the device gets it when it leaves.
        """
        for touch in touches:
            for lane in self._lanes:
                if not lane.setting.min_uses:
                    continue
                with self._queued_lock:
                    num_queued = lane.num_queued_touches + len(touch.links)
                    if num_queued > MAX_QUEUED_TOUCHES:
                        continue
                    lane.num_queued_touches = num_queued
                lane.stores.put(touch)

    def begin(self, load: PageLoad) -> None:
        """Begin a load; `completions` tells its end."""
        found: list[StoredPage | None] = [None] * len(load.links[:BATCH_PAGES])
        fetch = _Fetch(load, self._clock(), self._num_flushes, found)
        self._fetches.append(fetch)
        self._pass_on(fetch, self._next_lane(fetch, 0))

    def flush(self, order: LevelFlush) -> None:
        """Empty levels when what was ordered before is written; `completions` tells the end.

        Of what is on its way out of these levels, or has left one above on its way into them,
        nothing comes down after it. The other ways go on.
        """
        # Those above the last one feed it: what they let go of before this must not come after it.
        last = max((i for i, name in enumerate(self.names) if name in order.levels), default=0)
        lanes = self._lanes[: last + 1]
        meeting = threading.Barrier(len(lanes), partial(self._flush, order))
        with self._flush_lock:
            self._num_flushes += 1
            for lane in lanes:
                lane.stores.put(meeting)

    def completions(self) -> tuple[PagesLoaded | PagesLost | LevelsFlushed, ...]:
        """What ended or was lost since the last call; loads that took too long are given up."""
        self._news.clear()
        now = self._clock()
        ended: list[PagesLoaded | PagesLost | LevelsFlushed] = []
        while not self._lost.empty():
            ended.append(self._lost.get())
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
        """Write what is still to be written, for at most `CLOSE_S`, and close the levels.

        The ways between them are waited for together.
        """
        end_s = monotonic() + CLOSE_S
        for fetch in self._fetches:
            fetch.is_over = True  # nobody waits for it any more
        for lane in self._lanes:
            lane.stores.put(None)
            lane.loads.put(None)
        for thread in self._threads:
            thread.join(max(0.0, end_s - monotonic()))
        for way in self._overflows:
            way.finish(max(0.0, end_s - monotonic()))
        if num_bytes := self.stats().num_queued_bytes:
            _logger.warning("%d bytes of pages are not kept: there was no time to write", num_bytes)
        for way in self._overflows:
            way.end()
        end_s = monotonic() + WAYS_CLOSE_S
        for way in self._overflows:
            way.close(max(0.0, end_s - monotonic()))
        for setting in self._settings:
            setting.level.close()

    # The threads.

    def _run_stores(self, lane: _Lane) -> None:
        give_way()
        use_device(self._device)
        while (order := lane.stores.get()) is not None:
            if isinstance(order, threading.Barrier):
                order.wait()
                continue
            if isinstance(order, PageTouch):
                self._guarded(partial(self._touch, lane, order))
                with self._queued_lock:
                    lane.num_queued_touches -= len(order.links)
                continue
            if order.coming is not None:
                order.coming.wait()
            self._guarded(partial(lane.level.store, order.pages, STORE_DEADLINE_S))
            with self._queued_lock:
                lane.num_queued_bytes -= order.num_bytes
                order.num_takers -= 1
                if not order.num_takers:
                    self.num_queued_bytes -= order.num_bytes

    def _touch(self, lane: _Lane, touch: PageTouch) -> None:
        here = lane.level.touch([link.key for link in touch.links])
        lost = tuple(
            page_id
            for page_id, num_uses, is_here in zip(touch.page_ids, touch.num_uses, here, strict=True)
            if not is_here and lane.takes(num_uses)
        )
        if lost:
            self._lost.put(PagesLost(lost))

    def _flush(self, order: LevelFlush) -> None:
        pages: dict[str, int | None] = {}

        def empty(level: Level) -> None:
            num_pages = level.stats().num_pages
            level.clear()
            pages[level.name] = num_pages

        for setting in self._settings:
            if setting.overflow is None:
                continue
            if setting.level.name in order.levels:
                self._guarded(setting.overflow.drop)
            elif setting.overflow.below.name in order.levels:
                self._guarded(setting.overflow.drop_left)
        levels = [s.level for s in self._settings if s.level.name in order.levels]
        failed = [each.name for each in levels if not self._guarded(partial(empty, each))]
        self._flushed.put(LevelsFlushed(order.query_id, pages, tuple(failed)))
        self._news.set()

    def _run_loads(self, lane: _Lane) -> None:
        use_device(self._device)
        while (fetch := lane.loads.get()) is not None:
            if not self._guarded(partial(self._fetch, fetch, lane)):
                self._pass_on(fetch, None)

    def _pass_on(self, fetch: _Fetch, lane: _Lane | None) -> None:
        """To the level that is next; with none, it has ended."""
        if lane is not None:
            lane.loads.put(fetch)
            return
        with fetch.lock:
            fetch.ended_s = self._clock()
            fetch.note(0, fetch.ended_s)
            fetch.is_over = True
        self._news.set()

    def _fetch(self, fetch: _Fetch, lane: _Lane) -> None:
        """All that this level can do now. Given up while it waited, it asks for no more."""
        rank = self._lanes.index(lane)
        following = None if fetch.is_over else lane
        while following is lane:
            self._ask(lane, self._lanes[:rank], fetch)
            following = self._next_lane(fetch, rank + 1)
        self._pass_on(fetch, following)

    def _next_lane(self, fetch: _Fetch, rank: int) -> _Lane | None:
        """Of those from `rank` on, the first that is believed to have a page that is missing.

        Where none is, what came is put in its place, and the next pages are asked for from the
        fastest level on.
        """
        while not fetch.is_over:
            for lane in self._lanes[rank:]:
                if self._believed(lane, fetch):
                    return lane
            if not self._put_in(fetch):
                return None
            rank = 0
        return None

    def _believed(self, lane: _Lane, fetch: _Fetch) -> list[int]:
        """Which of the missing pages, by their place among those asked for, the level may have."""
        missing = [i for i, page in enumerate(fetch.found) if page is None]
        keys = [fetch.load.links[fetch.num_done + i].key for i in missing]
        here = lane.level.contains(keys) if keys else ()
        return [i for i, is_here in zip(missing, here, strict=True) if is_here]

    def _put_in(self, fetch: _Fetch) -> bool:
        """Put what came of these pages, up to the first miss. Whether there are more to ask for."""
        pages = list(takewhile(lambda page: page is not None, fetch.found))
        first, num_asked = fetch.num_done, len(fetch.found)
        page_ids = fetch.load.page_ids[first : first + len(pages)]
        with fetch.lock:
            if fetch.is_over:
                return False
            if pages:
                self._swaps.put_in(page_ids, [page.payload for page in pages if page is not None])
            fetch.num_done += len(pages)
        following = fetch.load.links[fetch.num_done : fetch.num_done + BATCH_PAGES]
        fetch.found = [None] * len(following)
        return len(pages) == num_asked and bool(following)

    def _ask(self, lane: _Lane, above: Sequence[_Lane], fetch: _Fetch) -> None:
        """Take what one level has. A key is never trusted alone, a level not at all."""
        believed = self._believed(lane, fetch)
        if not believed:
            return
        links = [fetch.load.links[fetch.num_done + i] for i in believed]
        with fetch.lock:
            fetch.asked = (lane.level.name, len(links), self._clock())
        loaded = lane.level.load([link.key for link in links], lane.setting.deadline_s)
        came: list[StoredPage] = []
        for i, page, link in zip(believed, loaded, links, strict=True):
            if page is not None and self._is_page_of(page, link):
                fetch.found[i] = page
                came.append(page)
        with fetch.lock:
            fetch.note(len(came), self._clock())
        self._promote(came, above, fetch)

    def _promote(self, pages: Sequence[StoredPage], above: Sequence[_Lane], fetch: _Fetch) -> None:
        """Keep what came from far away nearer: it was used before, and is again.

        Not what was read before a flush: it would come back there.
        """
        with self._flush_lock:
            if fetch.num_flushes != self._num_flushes:
                return
            takers = [lane for lane in above if lane.setting.min_uses == 1]
            with_takers = [(page, tuple(filter(self._has_room, takers))) for page in pages]
            for kept, group in groupby(with_takers, lambda one: one[1]):
                if kept:
                    self._queue([page for page, _ in group], kept)

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

    def _takers(self, num_uses: int) -> tuple[_Lane, ...]:
        """The levels that take one more page after so many uses; they have room for it reserved."""
        return tuple(lane for lane in self._lanes if lane.takes(num_uses) and self._has_room(lane))

    def _has_room(self, lane: _Lane) -> bool:
        """Reserve room for one more page on its way to this level."""
        with self._queued_lock:
            if self._num_free_bytes(lane) < self._page_bytes:
                self.num_dropped_stores += 1
                self._complaints.warn("pages are not kept", f"{lane.level.name} writes too slowly")
                return False
            lane.num_queued_bytes += self._page_bytes
            return True

    def _num_free_bytes(self, lane: _Lane) -> int:
        return MAX_QUEUED_BYTES // self._num_fed - lane.num_queued_bytes

    def _queue(
        self, pages: list[StoredPage], takers: Sequence[_Lane], coming: PagesOut | None = None
    ) -> None:
        """The pages go to these levels, which have room for them reserved."""
        order = _StoreOrder(pages, self._page_bytes * len(pages), len(takers), coming)
        with self._queued_lock:
            self.num_queued_bytes += order.num_bytes
        for lane in takers:
            lane.stores.put(order)
