"""What leaves a level comes to the next one; nobody waits for it, and it is bounded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from level_pages import ROOT, key_of, page_of

from kvpaging.levels.disk import MIN_CAPACITY_BYTES, DiskLevel
from kvpaging.levels.host import HostLevel
from kvpaging.levels.level import StoredPage
from kvpaging.levels.overflow import Overflow

PAYLOAD = 20_000
PAGE_BYTES = PAYLOAD + 16 + 512


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


class Gate(HostLevel):
    """Stores nothing until it is opened."""

    def __init__(self) -> None:
        super().__init__(1 << 30)
        self.opened = threading.Event()

    def store(self, pages: Sequence[StoredPage], deadline_s: float) -> int:
        self.opened.wait(120)
        return super().store(pages, deadline_s)


@pytest.fixture
def way() -> Iterator[Callable[..., Overflow]]:
    ways: list[Overflow] = []

    def make(below: HostLevel, max_bytes: int = 1 << 30) -> Overflow:
        ways.append(Overflow(below, max_bytes=max_bytes))
        return ways[-1]

    yield make
    for one in ways:
        if isinstance(one.below, Gate):
            one.below.opened.set()
        one.close(60.0)


def test_what_leaves_the_host_goes_down_parents_first(way: Callable[..., Overflow]) -> None:
    below = HostLevel(1 << 20)
    overflow = way(below)
    host = HostLevel(2 * PAGE_BYTES, overflow=overflow)
    pages = [page_of(n, PAYLOAD) for n in range(4)]
    host.store(pages[:2], 1.0)
    assert overflow.is_idle
    assert below.stats().stores == 0
    host.store(pages[2:], 1.0)
    until(lambda: overflow.is_idle)
    assert below.contains([page.key for page in pages]) == [True, True, False, False]
    assert below.load([pages[0].key], 1.0) == [pages[0]]


def test_nobody_waits_for_the_level_below_and_the_bound_holds(
    way: Callable[..., Overflow],
) -> None:
    below = Gate()
    overflow = way(below, max_bytes=5 * PAYLOAD)
    host = HostLevel(2 * PAGE_BYTES, overflow=overflow)
    started = time.monotonic()
    for number in range(20):
        host.store([page_of(number, PAYLOAD)], 1.0)
        assert overflow.num_bytes <= 5 * PAYLOAD
    assert time.monotonic() - started < 100, "the level below hangs for 120"
    assert (overflow.num_bytes, overflow.num_dropped_pages) == (5 * PAYLOAD, 13)
    below.opened.set()
    until(lambda: overflow.is_idle)
    assert overflow.num_bytes == 0
    assert below.stats().num_pages == 5


def test_a_bug_below_ends_no_thread(way: Callable[..., Overflow]) -> None:
    class Broken(HostLevel):
        is_broken = True

        def store(self, pages: Sequence[StoredPage], deadline_s: float) -> int:
            if self.is_broken:
                raise RuntimeError("a bug of the level's")
            return super().store(pages, deadline_s)

    below = Broken(1 << 20)
    overflow = way(below)
    overflow.put([page_of(1)])
    until(lambda: overflow.is_idle)
    below.is_broken = False
    overflow.put([page_of(2)])
    until(lambda: overflow.is_idle)
    assert below.contains([key_of(1), key_of(2)]) == [False, True]
    assert overflow.num_bytes == 0


def opened(directory: Path, overflow: Overflow | None, root: bytes = ROOT) -> DiskLevel:
    return DiskLevel(
        directory,
        MIN_CAPACITY_BYTES,
        root=root,
        item_bytes=2,
        segment_bytes=128 << 10,
        overflow=overflow,
    )


def fill(level: DiskLevel, overflow: Overflow, numbers: range) -> None:
    """Store so slowly that the level below follows."""
    for number in numbers:
        level.store([page_of(number, PAYLOAD)], 60.0)
        until(lambda: overflow.is_idle)


def test_what_leaves_the_disk_is_below(tmp_path: Path, way: Callable[..., Overflow]) -> None:
    below = HostLevel(1 << 30)
    overflow = way(below)
    level = opened(tmp_path / "cache", overflow)
    fill(level, overflow, range(20))
    assert below.stats().stores == 0, "nothing has to go yet"
    fill(level, overflow, range(20, 200))
    keys = [key_of(n) for n in range(200)]
    on_disk, there = level.contains(keys), below.contains(keys)
    assert 10 < sum(on_disk) < 60
    assert all(here or gone for here, gone in zip(on_disk, there, strict=True))
    assert overflow.num_dropped_pages == 0
    assert below.stats().stores < 200, "most of them once, as they leave"
    for number, page in enumerate(below.load(keys[:100], 1.0)):
        assert page == page_of(number, PAYLOAD)
    level.close()


def test_the_disk_waits_for_nobody_and_says_what_did_not_go_down(
    tmp_path: Path, way: Callable[..., Overflow]
) -> None:
    below = Gate()
    overflow = way(below)
    level = opened(tmp_path / "cache", overflow)
    started = time.monotonic()
    for number in range(200):
        assert level.store([page_of(number, PAYLOAD)], 60.0) == 1
    assert time.monotonic() - started < 100, "the level below hangs for 120"
    assert overflow.num_bytes == 0, "what waits to be read takes no memory"
    below.opened.set()
    until(lambda: overflow.is_idle)
    keys = [key_of(n) for n in range(200)]
    is_anywhere = [a or b for a, b in zip(level.contains(keys), below.contains(keys), strict=True)]
    assert 0 < overflow.num_dropped_pages == is_anywhere.count(False)
    level.close()


def test_what_is_next_to_leave_the_disk_goes_down_though_what_left_is_dropped(
    tmp_path: Path, way: Callable[..., Overflow]
) -> None:
    below = Gate()
    overflow = way(below)
    level = opened(tmp_path / "cache", overflow)
    number = 0
    while overflow.is_idle:
        level.store([page_of(number, PAYLOAD)], 60.0)
        number += 1
    overflow.put([page_of(1000, PAYLOAD)])
    overflow.drop_left()
    below.opened.set()
    fill(level, overflow, range(number, 200))
    keys = [key_of(n) for n in range(200)]
    is_anywhere = [a or b for a, b in zip(level.contains(keys), below.contains(keys), strict=True)]
    assert overflow.num_dropped_pages == 0
    assert all(is_anywhere)
    assert not below.contains([key_of(1000)])[0]
    level.close()


def test_pages_of_other_weights_and_broken_ones_are_not_passed_on(
    tmp_path: Path, way: Callable[..., Overflow]
) -> None:
    below = HostLevel(1 << 30)
    overflow = way(below)
    other = opened(tmp_path / "cache", None, root=bytes(32))
    for number in range(10):
        other.store([page_of(number, PAYLOAD)], 1.0)
    other.close()
    level = opened(tmp_path / "cache", overflow)
    fill(level, overflow, range(10, 20))
    path = sorted((tmp_path / "cache").glob("*.pages"))[-2]
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    fill(level, overflow, range(20, 100))
    there = below.contains([key_of(n) for n in range(40)])
    assert not any(there[:10])
    assert there[10:].count(False) == 1
    level.close()
