"""Levels that are slow, lying, failing or late cost a miss, never a wrong page or a stuck load."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from kvpaging.base.ids import PageId, PageKey, SeqId
from kvpaging.base.kv_spec import KVSpec
from kvpaging.cache.lower_levels import PageLoad, PagesLoaded, PageStore
from kvpaging.cache.prefix_key import ChainLink
from kvpaging.execution import page_mover
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.page_mover import LevelSetting, PageMover
from kvpaging.levels.host import HostLevel
from kvpaging.levels.level import StoredPage

SPEC = KVSpec(num_layers=2, num_kv_heads=1, head_dim=4, page_size=2, dtype="bfloat16")


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
    pool.pages.copy_(torch.randn(pool.pages.shape))
    return pool


@pytest.fixture
def make(pool: KVPool) -> Iterator[Callable[..., PageMover]]:
    movers: list[PageMover] = []

    def make(*levels: HostLevel, through: bool = True, give_up_s: float = 5.0) -> PageMover:
        settings = [LevelSetting(level, through, deadline_s=1.0) for level in levels]
        movers.append(PageMover(pool, settings, give_up_s=give_up_s))
        return movers[-1]

    yield make
    for mover in movers:
        mover.close()


def stored(mover: PageMover, level: HostLevel, pool: KVPool, numbers: Sequence[int]) -> None:
    """Store page `n` under link `n` and wait until it is there."""
    mover.store(
        [PageStore(PageId(n), PageKey(bytes(32)), link(n), is_eviction=False) for n in numbers]
    )
    until(lambda: all(level.contains([link(n).key for n in numbers])))


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 5
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
    assert mover.probe([link(n) for n in range(1, 25)]) == 20
    assert fetched(mover, range(1, 25)).num_pages == 20
    for i, number in enumerate(range(1, 21)):
        assert pool.read_page(PageId(32 + i)) == pool.read_page(PageId(number))


def test_a_page_is_copied_when_it_is_ordered(make: Callable[..., PageMover], pool: KVPool) -> None:
    level = HostLevel(1 << 20)
    mover, before = make(level), pool.read_page(PageId(1))
    mover.store([PageStore(PageId(1), PageKey(bytes(32)), link(1), is_eviction=False)])
    pool.pages[1].zero_()
    until(lambda: level.contains([link(1).key])[0])
    fetched(mover, [1])
    assert pool.read_page(PageId(32)) == before


def test_pages_of_two_levels_make_one_prefix(make: Callable[..., PageMover], pool: KVPool) -> None:
    fast, slow = HostLevel(1 << 20), HostLevel(1 << 20)
    for number in (1, 3):
        page = StoredPage(
            link(number).key, PageKey(b""), link(number).tokens, pool.read_page(PageId(number))
        )
        (fast if number == 1 else slow).store([page], 1.0)
    page = StoredPage(link(2).key, PageKey(b""), link(2).tokens, pool.read_page(PageId(2)))
    slow.store([page], 1.0)
    mover = make(fast, slow)
    assert mover.probe([link(n) for n in (1, 2, 3, 4)]) == 3
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
    before = pool.read_page(PageId(32))
    assert fetched(mover, [1, 2]).num_pages == 0
    assert pool.read_page(PageId(32)) == before
    level.change = lambda pages: pages
    assert fetched(mover, [1, 2]).num_pages == 2, "the thread outlived it"


def test_a_hung_level_is_given_up_and_writes_nothing_after(
    make: Callable[..., PageMover], pool: KVPool
) -> None:
    hang = threading.Event()

    def late(pages: list[StoredPage | None]) -> list[StoredPage | None]:
        hang.wait(10)
        return pages

    level = BadLevel(late)
    mover = make(level, give_up_s=0.05)
    stored(mover, level, pool, [1])
    before = pool.read_page(PageId(32))
    ended = fetched(mover, [1])
    assert ended.num_pages == 0
    assert ended.elapsed_s < 5
    hang.set()
    assert fetched(mover, [1], first_page=40).num_pages == 1
    assert pool.read_page(PageId(32)) == before, "its pages may belong to another by now"


def test_what_writing_can_not_follow_is_not_kept(
    make: Callable[..., PageMover], pool: KVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_mover, "MAX_QUEUED_BYTES", 2 * SPEC.page_bytes)
    level = HostLevel(1 << 20)
    mover = make(level)
    orders = [PageStore(PageId(n), PageKey(b""), link(n), is_eviction=False) for n in range(1, 6)]
    mover.store(orders)
    until(lambda: level.contains([link(2).key])[0])
    assert mover.num_dropped_stores == 3
    until(lambda: mover.num_queued_bytes == 0)


def test_levels_take_what_they_are_set_to(make: Callable[..., PageMover], pool: KVPool) -> None:
    level = HostLevel(1 << 20)
    mover = make(level, through=False)
    assert (mover.wants_computed, mover.wants_evicted) == (False, True)
    mover.store(
        [
            PageStore(PageId(1), PageKey(b""), link(1), is_eviction=False),
            PageStore(PageId(2), PageKey(b""), link(2), is_eviction=True),
        ]
    )
    until(lambda: level.contains([link(2).key])[0])
    assert level.contains([link(1).key]) == [False]
