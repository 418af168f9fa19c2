"""Levels that are slow, lying, failing or late cost a miss, never a wrong page or a stuck load."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from kernels import select
from kvpaging.base.ids import PageId, PageKey, SeqId
from kvpaging.base.kv_spec import KVSpec
from kvpaging.cache.lower_levels import LevelFlush, LevelsFlushed, PageLoad, PagesLoaded, PageStore
from kvpaging.cache.prefix_key import ChainLink
from kvpaging.execution import page_mover
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.page_mover import LevelSetting, PageMover
from kvpaging.levels.host import HostLevel
from kvpaging.levels.level import LevelStats, StoredPage
from kvpaging.levels.overflow import Overflow

SPEC = KVSpec(num_layers=2, num_kv_heads=1, head_dim=4, page_size=2, dtype="bfloat16")


OPS = select("cpu")


def read_page(pool: KVPool, page_id: PageId) -> bytes:
    return pool.pages[page_id].numpy().tobytes()


def link(number: int) -> ChainLink:
    key = PageKey(hashlib.sha256(bytes([number])).digest())
    return ChainLink(key, number.to_bytes(4, "little") * SPEC.page_size)


class BadLevel(HostLevel):
    """A host level whose loads go through `change`."""

    def __init__(self, change: Callable[[list[StoredPage | None]], list[StoredPage | None]]):
        super().__init__(1 << 20)
        self.change = change

    def load(self, keys: Sequence[PageKey], deadline_s: float) -> list[StoredPage | None]:
        return self.change(super().load(keys, deadline_s))


@pytest.fixture
def pool() -> KVPool:
    pool = KVPool(SPEC, 64, torch.device("cpu"))
    pool.pages.random_(256)
    return pool


@pytest.fixture
def make(pool: KVPool) -> Iterator[Callable[..., PageMover]]:
    movers: list[PageMover] = []

    def make(*levels: HostLevel, min_uses: int = 1, give_up_s: float = 5.0) -> PageMover:
        settings = [LevelSetting(level, min_uses, deadline_s=1.0) for level in levels]
        movers.append(PageMover(pool, OPS, settings, give_up_s=give_up_s))
        return movers[-1]

    yield make
    for mover in movers:
        mover.close()


def stored(mover: PageMover, level: HostLevel, pool: KVPool, numbers: Sequence[int]) -> None:
    """Store page `n` under link `n` and wait until it is there."""
    mover.store([PageStore(PageId(n), PageKey(bytes(32)), link(n), num_uses=1) for n in numbers])
    until(lambda: all(level.contains([link(n).key for n in numbers])))


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def fetched(mover: PageMover, numbers: Sequence[int], first_page: int = 32) -> PagesLoaded:
    pages = tuple(PageId(first_page + i) for i in range(len(numbers)))
    mover.begin(PageLoad(SeqId(1), pages, tuple(link(n) for n in numbers)))
    ended: list[PagesLoaded] = []
    while not ended:
        mover.wait(1.0)
        ended.extend(mover.completions())
    assert len(ended) == 1
    return ended[0]


def test_a_page_comes_back_as_it_went(make: Callable[..., PageMover], pool: KVPool) -> None:
    level = HostLevel(1 << 20)
    mover = make(level)
    stored(mover, level, pool, range(1, 21))
    assert mover.probe([link(n) for n in range(1, 25)]) == (("host", 20),)
    assert fetched(mover, range(1, 25)).num_pages == 20
    for i, number in enumerate(range(1, 21)):
        assert read_page(pool, PageId(32 + i)) == read_page(pool, PageId(number))


def test_its_threads_use_the_device_of_the_pool(
    make: Callable[..., PageMover], pool: KVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[tuple[str, torch.device]] = set()

    def use(device: torch.device) -> None:
        used.add((threading.current_thread().name, device))

    monkeypatch.setattr(page_mover, "use_device", use)
    make(HostLevel(1 << 20)).close()
    assert used == {(f"{what} host", pool.pages.device) for what in ("stores in", "loads from")}


def test_a_page_is_copied_when_it_is_ordered(make: Callable[..., PageMover], pool: KVPool) -> None:
    level = HostLevel(1 << 20)
    mover, before = make(level), read_page(pool, PageId(1))
    mover.store([PageStore(PageId(1), PageKey(bytes(32)), link(1), num_uses=1)])
    pool.pages[1].zero_()
    until(lambda: level.contains([link(1).key])[0])
    fetched(mover, [1])
    assert read_page(pool, PageId(32)) == before


def test_pages_of_two_levels_make_one_prefix(make: Callable[..., PageMover], pool: KVPool) -> None:
    fast, slow = HostLevel(1 << 20), HostLevel(1 << 20)
    slow.name = "slow"
    for number in (1, 3):
        page = StoredPage(
            link(number).key, PageKey(b""), link(number).tokens, read_page(pool, PageId(number))
        )
        (fast if number == 1 else slow).store([page], 1.0)
    page = StoredPage(link(2).key, PageKey(b""), link(2).tokens, read_page(pool, PageId(2)))
    slow.store([page], 1.0)
    mover = make(fast, slow)
    assert mover.probe([link(n) for n in (1, 2, 3, 4)]) == (("host", 1), ("slow", 2))
    assert fetched(mover, [1, 2, 3, 4]).num_pages == 3


def swapped_tokens(pages: list[StoredPage | None]) -> list[StoredPage | None]:
    return [page and page._replace(tokens=b"\0" * 8) for page in pages]


def other_key(pages: list[StoredPage | None]) -> list[StoredPage | None]:
    return [page and page._replace(key=link(99).key) for page in pages]


def cut_off(pages: list[StoredPage | None]) -> list[StoredPage | None]:
    return [page and page._replace(payload=page.payload[:-1]) for page in pages]


def broken(pages: list[StoredPage | None]) -> list[StoredPage | None]:
    raise RuntimeError("a bug of the level's")


@pytest.mark.parametrize("change", [swapped_tokens, other_key, cut_off, broken])
def test_a_lying_or_failing_level_is_a_miss(
    change: Callable[..., list[StoredPage | None]], make: Callable[..., PageMover], pool: KVPool
) -> None:
    level = BadLevel(change)
    mover = make(level)
    stored(mover, level, pool, [1, 2])
    before = read_page(pool, PageId(32))
    assert fetched(mover, [1, 2]).num_pages == 0
    assert read_page(pool, PageId(32)) == before
    level.change = lambda pages: pages
    assert fetched(mover, [1, 2]).num_pages == 2, "the thread outlived it"


def test_a_hung_level_is_given_up_and_writes_nothing_after(
    make: Callable[..., PageMover], pool: KVPool
) -> None:
    hang = threading.Event()

    def late(pages: list[StoredPage | None]) -> list[StoredPage | None]:
        hang.wait(120)
        return pages

    level = BadLevel(late)
    mover = make(level, give_up_s=0.05)
    stored(mover, level, pool, [1])
    before = read_page(pool, PageId(32))
    ended = fetched(mover, [1])
    assert ended.num_pages == 0
    assert ended.elapsed_s < 100
    hang.set()
    assert fetched(mover, [1], first_page=40).num_pages == 1
    assert read_page(pool, PageId(32)) == before, "its pages may belong to another by now"


def test_what_writing_can_not_follow_is_not_kept(
    make: Callable[..., PageMover], pool: KVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_mover, "MAX_QUEUED_BYTES", 2 * SPEC.page_bytes)
    level = HostLevel(1 << 20)
    mover = make(level)
    orders = [PageStore(PageId(n), PageKey(b""), link(n), num_uses=1) for n in range(1, 6)]
    mover.store(orders)
    until(lambda: level.contains([link(2).key])[0])
    assert mover.num_dropped_stores == 3
    assert mover.num_storable() in (0, 1, 2)
    until(lambda: mover.num_queued_bytes == 0)


class Held(HostLevel):
    """Far away; stores and loads only while it is let."""

    name = "far"

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.go_on = threading.Event()
        self.brought: list[StoredPage] = []

    def store(self, pages: Sequence[StoredPage], deadline_s: float) -> int:
        self.brought += pages
        self.go_on.wait(10)
        return super().store(pages, deadline_s)

    def load(self, keys: Sequence[PageKey], deadline_s: float) -> list[StoredPage | None]:
        self.go_on.wait(10)
        return super().load(keys, deadline_s)


def test_a_slow_level_loses_its_own_pages_and_no_others(
    make: Callable[..., PageMover], pool: KVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_mover, "MAX_QUEUED_BYTES", 8 * SPEC.page_bytes)
    near, far = HostLevel(1 << 20), Held()
    mover = make(near, far)
    for first in range(1, 21, 2):
        stored(mover, near, pool, [first, first + 1])
    assert mover.num_dropped_stores == 16, "what the slow one has no room for"
    assert mover.num_storable() == 4, "the other one is ready for more"
    until(lambda: mover.num_queued_bytes == 4 * SPEC.page_bytes)
    far.go_on.set()
    until(lambda: mover.num_queued_bytes == 0)
    assert far.contains([link(n).key for n in range(1, 7)]) == [True] * 4 + [False] * 2


def test_what_waits_for_two_levels_is_in_memory_once_and_holds_no_other_page_there(
    make: Callable[..., PageMover], pool: KVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_mover, "MAX_QUEUED_BYTES", 6 * SPEC.page_bytes)
    near, far = Held(), Held()
    mover = make(near, far)
    ordered(mover, [1])
    assert mover.num_queued_bytes == SPEC.page_bytes
    mover.store([PageStore(PageId(n), PageKey(bytes(32)), link(n), num_uses=1) for n in (2, 3, 4)])
    assert mover.num_queued_bytes == 3 * SPEC.page_bytes
    near.go_on.set()
    until(lambda: near.contains([link(3).key])[0])
    # The slow one has room for none of these; what it holds is not kept by them, nor they by it.
    mover.store([PageStore(PageId(n), PageKey(bytes(32)), link(n), num_uses=1) for n in (5, 6)])
    until(lambda: near.contains([link(6).key])[0])
    until(lambda: mover.num_queued_bytes == 3 * SPEC.page_bytes)
    far.go_on.set()
    until(lambda: mover.num_queued_bytes == 0)
    own = [page.payload for page in far.brought]
    assert len(own) == 3
    memory = {id(p.obj.base): p.obj.base.nbytes for p in own}  # type: ignore[union-attr]
    assert sum(memory.values()) == 3 * SPEC.page_bytes


def test_loads_from_one_level_do_not_wait_for_another(
    make: Callable[..., PageMover], pool: KVPool
) -> None:
    near, far = HostLevel(1 << 20), Held()
    mover = make(near, far)
    page = StoredPage(link(1).key, PageKey(b""), link(1).tokens, read_page(pool, PageId(1)))
    far.go_on.set()
    far.store([page], 1.0)
    far.go_on.clear()
    mover.begin(PageLoad(SeqId(1), (PageId(40),), (link(1),)))
    near.store([page._replace(key=link(2).key, tokens=link(2).tokens)], 1.0)
    mover.begin(PageLoad(SeqId(2), (PageId(41),), (link(2),)))
    ended: list[PagesLoaded | LevelsFlushed] = []
    until(lambda: ended.extend(mover.completions()) or ended)
    assert [(end.seq_id, end.num_pages) for end in ended if isinstance(end, PagesLoaded)] == [
        (2, 1)
    ]
    far.go_on.set()
    until(lambda: ended.extend(mover.completions()) or len(ended) == 2)
    assert isinstance(ended[1], PagesLoaded)
    assert ended[1].num_pages == 1


def test_long_loads_go_from_level_to_level_and_back(
    make: Callable[..., PageMover], pool: KVPool
) -> None:
    levels = [HostLevel(1 << 20) for _ in range(3)]
    for rank, level in enumerate(levels):
        level.name = f"level {rank}"
    numbers = range(1, 2 * page_mover.BATCH_PAGES)
    pool.pages.random_(256)
    wide = KVPool(SPEC, 1 + 2 * len(numbers), pool.pages.device)
    payloads = {n: bytes([n]) * SPEC.page_bytes for n in numbers}
    for n in numbers:
        page = StoredPage(link(n).key, PageKey(b""), link(n).tokens, payloads[n])
        levels[n % 3].store([page], 1.0)
    mover = PageMover(wide, OPS, [LevelSetting(level, 2, 1.0) for level in levels])
    ended = fetched(mover, numbers, first_page=1)
    assert ended.num_pages == len(numbers)
    assert sorted(load.num_loaded for load in ended.levels) == [21, 21, 21]
    for i, n in enumerate(numbers):
        assert read_page(wide, PageId(1 + i)) == payloads[n]
    mover.close()


def test_levels_take_what_they_are_set_to(pool: KVPool) -> None:
    through, picky, evicted, fed = levels = [HostLevel(1 << 20) for _ in range(4)]
    settings = [
        LevelSetting(level, uses, 1.0) for level, uses in zip(levels, (1, 3, 0, None), strict=True)
    ]
    mover = PageMover(pool, OPS, settings)
    assert (mover.store_at_uses, mover.wants_evicted) == ((1, 3), True)
    mover.store([PageStore(PageId(n + 1), PageKey(b""), link(n), num_uses=n) for n in range(4)])
    until(lambda: mover.num_queued_bytes == 0)
    keys = [link(n).key for n in range(4)]
    assert through.contains(keys) == [False, True, True, True]
    assert picky.contains(keys) == [False, False, False, True]
    assert evicted.contains(keys) == [True, False, False, False]
    assert fed.contains(keys) == [False] * 4
    mover.close()


def test_what_came_from_far_away_is_kept_nearer(
    make: Callable[..., PageMover], pool: KVPool
) -> None:
    near, far = HostLevel(1 << 20), HostLevel(1 << 20)
    far.name = "far"
    mover = make(near, far)
    stored(mover, far, pool, range(1, 4))
    near.clear()
    ended = fetched(mover, range(1, 5))
    assert ended.num_pages == 3
    assert [(load.level, load.num_asked, load.num_loaded) for load in ended.levels] == [
        ("far", 3, 3)
    ]
    until(lambda: all(near.contains([link(n).key for n in range(1, 4)])))
    assert mover.probe([link(1)]) == (("host", 1),)


def flushed(mover: PageMover, *levels: str) -> LevelsFlushed:
    mover.flush(LevelFlush(3, levels))
    ended: list[PagesLoaded | LevelsFlushed] = []
    until(lambda: ended.extend(mover.completions()) or ended)
    (answer,) = ended
    assert isinstance(answer, LevelsFlushed)
    return answer


def test_a_flush_comes_after_what_was_ordered_and_before_what_follows(
    make: Callable[..., PageMover], pool: KVPool
) -> None:
    class Slow(HostLevel):
        def store(self, pages: Sequence[StoredPage], deadline_s: float) -> int:
            time.sleep(0.05)
            return super().store(pages, deadline_s)

    level = Slow(1 << 20)
    mover = make(level)
    mover.store([PageStore(PageId(1), PageKey(bytes(32)), link(1), num_uses=1)])
    mover.flush(LevelFlush(3, ("host",)))
    mover.store([PageStore(PageId(2), PageKey(bytes(32)), link(2), num_uses=1)])
    until(lambda: not mover.num_queued_bytes)
    assert level.contains([link(1).key, link(2).key]) == [False, True]
    assert mover.completions() == (LevelsFlushed(3, {"host": 1}),)


def test_only_the_levels_that_are_named_are_emptied(
    make: Callable[..., PageMover], pool: KVPool
) -> None:
    host, other = HostLevel(1 << 20), HostLevel(1 << 20)
    other.name = "other"
    mover = make(host, other)
    stored(mover, other, pool, [1, 2])
    assert flushed(mover, "other") == LevelsFlushed(3, {"other": 2})
    assert host.stats().num_pages == 2


@pytest.mark.parametrize("method", ["clear", "stats"])
def test_a_level_that_can_not_be_emptied_is_named_and_the_next_order_is_carried_out(
    make: Callable[..., PageMover], pool: KVPool, method: str
) -> None:
    class Broken(HostLevel):
        is_broken = True

        def clear(self) -> None:
            if self.is_broken and method == "clear":
                raise OSError("read-only")
            super().clear()

        def stats(self) -> LevelStats:
            if self.is_broken and method == "stats":
                raise OSError("gone")
            return super().stats()

    host, broken = HostLevel(1 << 20), Broken(1 << 20)
    broken.name = "broken"
    mover = make(broken, host)
    stored(mover, host, pool, [1, 2])
    assert flushed(mover, "broken", "host") == LevelsFlushed(3, {"host": 2}, ("broken",))
    broken.is_broken = False
    assert flushed(mover, "broken", "host") == LevelsFlushed(3, {"broken": 2, "host": 0})


def test_what_was_read_before_a_flush_is_not_kept_nearer_after_it(
    make: Callable[..., PageMover], pool: KVPool
) -> None:
    read, go_on = threading.Event(), threading.Event()

    def wait(pages: list[StoredPage | None]) -> list[StoredPage | None]:
        read.set()
        go_on.wait(60)
        return pages

    near, far = HostLevel(1 << 20), BadLevel(wait)
    far.name = "far"
    far.store([StoredPage(link(1).key, PageKey(bytes(32)), link(1).tokens, bytes(64))], 1.0)
    mover = make(near, far)
    mover.begin(PageLoad(SeqId(1), (PageId(40),), (link(1),)))
    assert read.wait(60)
    flushed(mover, "host", "far")
    go_on.set()
    ended: list[PagesLoaded | LevelsFlushed] = []
    until(lambda: ended.extend(mover.completions()) or ended)
    until(lambda: not mover.num_queued_bytes)
    assert not near.contains([link(1).key])[0]


def test_what_is_on_its_way_between_levels_does_not_come_after_a_flush(pool: KVPool) -> None:
    storing, go_on = threading.Event(), threading.Event()

    class Slow(HostLevel):
        def store(self, pages: Sequence[StoredPage], deadline_s: float) -> int:
            storing.set()
            go_on.wait(60)
            return super().store(pages, deadline_s)

    far = Slow(1 << 20)
    far.name = "far"
    way = Overflow(far)
    near = HostLevel(1 << 20, overflow=way)
    mover = PageMover(pool, OPS, [LevelSetting(near, 1, 1.0, way), LevelSetting(far, None, 1.0)])
    pages = [StoredPage(link(n).key, PageKey(b""), link(n).tokens, bytes(100)) for n in range(4)]
    way.put(pages[:2])
    assert storing.wait(60)
    way.put(pages[2:])
    assert mover.stats().num_queued_bytes == 400
    mover.flush(LevelFlush(3, ("far",)))
    until(lambda: mover.stats().num_queued_bytes == 200)  # what waited is dropped
    go_on.set()
    ended: list[PagesLoaded | LevelsFlushed] = []
    until(lambda: ended.extend(mover.completions()) or ended)
    assert ended == [LevelsFlushed(3, {"far": 2})]
    assert far.stats().num_pages == 0
    assert far.stats().stores == 2, "what waited behind it was not sent"
    assert mover.stats().num_queued_bytes == 0
    mover.close()


def test_what_a_level_lets_go_of_before_a_flush_does_not_come_after_it(pool: KVPool) -> None:
    """Of a level that takes its time, while the one below it is ready to be emptied at once."""
    page_bytes = SPEC.page_bytes + 2 * 4 + 512

    class Two(Held):
        def __init__(self, way: Overflow) -> None:
            HostLevel.__init__(self, 2 * page_bytes, overflow=way)
            self.go_on = threading.Event()
            self.brought = []

    far = HostLevel(1 << 20)
    way = Overflow(far)
    near = Two(way)
    mover = PageMover(pool, OPS, [LevelSetting(near, 1, 1.0, way), LevelSetting(far, None, 1.0)])
    ordered(mover, range(1, 9))
    mover.flush(LevelFlush(3, ("far", "host")))
    time.sleep(0.02)
    near.go_on.set()
    ended: list[PagesLoaded | LevelsFlushed] = []
    until(lambda: ended.extend(mover.completions()) or ended)
    until(lambda: way.is_idle)
    assert near.stats().stored == 8
    assert (near.stats().num_pages, far.stats().num_pages) == (0, 0)
    mover.close()


@pytest.mark.parametrize(
    ("level", "in_middle", "in_far"),
    [("host", [0], [2, 3, 4, 5]), ("middle", [], [2]), ("far", [0, 1], [4, 5])],
)
def test_a_flush_drops_only_what_is_on_its_way_from_or_into_what_it_empties(
    pool: KVPool, level: str, in_middle: list[int], in_far: list[int]
) -> None:
    """0 and 1 have left the host, 2 and 3 the middle, 4 and 5 are next to leave it.

    0 and 2 are being stored.
    """

    class Gate(HostLevel):
        def __init__(self, name: str) -> None:
            super().__init__(1 << 20)
            self.name = name
            self.storing, self.go_on = threading.Event(), threading.Event()

        def store(self, pages: Sequence[StoredPage], deadline_s: float) -> int:
            self.storing.set()
            self.go_on.wait(60)
            return super().store(pages, deadline_s)

    middle, far = Gate("middle"), Gate("far")
    into_middle, into_far = Overflow(middle), Overflow(far)
    settings = [
        LevelSetting(HostLevel(1 << 20), 1, 1.0, into_middle),
        LevelSetting(middle, None, 1.0, into_far),
        LevelSetting(far, None, 1.0),
    ]
    mover = PageMover(pool, OPS, settings)
    pages = [StoredPage(link(n).key, PageKey(b""), link(n).tokens, bytes(100)) for n in range(6)]
    is_over = threading.Event()

    def leaving() -> Iterator[list[StoredPage]]:
        is_over.wait(60)
        yield pages[4:5]
        yield pages[5:]

    into_middle.put(pages[:1])
    into_far.put(pages[2:3])
    assert middle.storing.wait(60)
    assert far.storing.wait(60)
    into_middle.put(pages[1:2])
    into_far.put(pages[3:4])
    into_far.pull(leaving())
    mover.flush(LevelFlush(3, (level,)))
    until(lambda: into_middle.num_bytes == (200 if level == "far" else 100))
    middle.go_on.set()
    until(lambda: into_far.num_bytes == (200 if level == "host" else 100))
    far.go_on.set()
    ended: list[PagesLoaded | LevelsFlushed] = []
    until(lambda: ended.extend(mover.completions()) or ended)
    is_over.set()
    until(lambda: into_middle.is_idle and into_far.is_idle)
    for each, there in ((middle, in_middle), (far, in_far)):
        found = each.contains([page.key for page in pages])
        assert [n for n, is_here in enumerate(found) if is_here] == there, each.name
    mover.close()


class Slow(HostLevel):
    """Takes `store_s` for each call that stores."""

    def __init__(self, store_s: float) -> None:
        super().__init__(1 << 20)
        self.store_s = store_s
        self.is_closed = False

    def store(self, pages: Sequence[StoredPage], deadline_s: float) -> int:
        time.sleep(self.store_s)
        return 0 if self.is_closed else super().store(pages, deadline_s)

    def close(self) -> None:
        self.is_closed = True


def ordered(mover: PageMover, numbers: Sequence[int]) -> list[PageKey]:
    for n in numbers:
        mover.store([PageStore(PageId(n), PageKey(bytes(32)), link(n), num_uses=1)])
    return [link(n).key for n in numbers]


def test_the_end_waits_for_what_is_on_its_way(pool: KVPool) -> None:
    far = Slow(0.02)
    far.name = "far"
    way = Overflow(far)
    near = HostLevel(2 * SPEC.page_bytes + 2 * 512, overflow=way)
    mover = PageMover(pool, OPS, [LevelSetting(near, 1, 1.0, way), LevelSetting(far, None, 1.0)])
    keys = ordered(mover, range(1, 9))
    mover.close()
    assert far.contains(keys).count(True) >= 6
    assert far.is_closed


def test_the_end_does_not_wait_for_a_level_that_hangs(
    pool: KVPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(page_mover, "CLOSE_S", 0.2)
    level = Slow(1.0)
    mover = PageMover(pool, OPS, [LevelSetting(level, 1, 1.0)])
    keys = ordered(mover, range(1, 5))
    started = time.monotonic()
    mover.close()
    assert 0.2 <= time.monotonic() - started < 0.9
    assert f"{4 * SPEC.page_bytes} bytes of pages are not kept" in caplog.text
    assert not any(level.contains(keys))


def test_the_end_waits_for_all_ways_between_levels_together(
    pool: KVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_mover, "CLOSE_S", 0.1)
    monkeypatch.setattr(page_mover, "WAYS_CLOSE_S", 0.5)
    go_on = threading.Event()

    class Stuck(HostLevel):
        def store(self, pages: Sequence[StoredPage], deadline_s: float) -> int:
            go_on.wait(60)
            return 0

    ways = [Overflow(Stuck(1 << 20)) for _ in range(6)]
    page = StoredPage(link(1).key, PageKey(b""), link(1).tokens, bytes(100))
    for way in ways:
        way.put([page])
    mover = PageMover(pool, OPS, [LevelSetting(way.below, None, 1.0, way) for way in ways])
    started = time.monotonic()
    mover.close()
    assert 0.6 <= time.monotonic() - started < 2.5
    go_on.set()


def test_the_end_does_not_wait_for_loads(pool: KVPool) -> None:
    class SlowToLoad(HostLevel):
        def load(self, keys: Sequence[PageKey], deadline_s: float) -> list[StoredPage | None]:
            time.sleep(0.1)
            return super().load(keys, deadline_s)

    level = SlowToLoad(1 << 20)
    mover = PageMover(pool, OPS, [LevelSetting(level, 1, 1.0)])
    stored(mover, level, pool, range(1, 21))
    for n in range(1, 21):
        mover.begin(PageLoad(SeqId(n), (PageId(32 + n),), (link(n),)))
    started = time.monotonic()
    mover.close()
    assert time.monotonic() - started < 1.0
