"""The host level: its bound, and which pages leave."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from level_pages import key_of, page_of

from kvpaging.base.errors import ConfigError
from kvpaging.base.evictions import Evicted, EvictionCause
from kvpaging.levels.host import HostLevel

PAGE_BYTES = 600 + 16 + 512


@given(
    st.integers(1, 9),
    st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 12), max_size=6)), max_size=30),
)
def test_holds_what_was_used_last(capacity: int, calls: list[tuple[bool, list[int]]]) -> None:
    level = HostLevel(capacity * PAGE_BYTES + 7)
    recent: list[int] = []  # the most recently used first
    for is_store, numbers in calls:
        if is_store:
            numbers = list(dict.fromkeys(numbers))[:capacity]
            assert level.store([page_of(n) for n in numbers], 1.0) == len(numbers)
            used = numbers
        else:
            found = level.load([key_of(n) for n in numbers], 1.0)
            assert found == [page_of(n) if n in recent else None for n in numbers]
            used = [n for n in dict.fromkeys(numbers) if n in recent]
        recent = [*used, *(n for n in recent if n not in used)][:capacity]
        held = level.contains([key_of(n) for n in range(13)])
        assert {n for n in range(13) if held[n]} == set(recent)
        stats = level.stats()
        assert stats.num_pages == len(recent)
        assert stats.num_bytes == len(recent) * PAGE_BYTES <= capacity * PAGE_BYTES + 7


@pytest.mark.parametrize("at_once", [1, 4, 40])
def test_a_chain_longer_than_the_level_keeps_what_can_be_found_of_it(at_once: int) -> None:
    pages = [page_of(0)]
    while len(pages) < 40:
        pages.append(page_of(len(pages), parent=pages[-1].key))
    level = HostLevel(12 * len(pages[0].payload) + 12 * 300)
    keys = [page.key for page in pages]
    for _ in range(3):
        for first in range(0, len(pages), at_once):
            level.store(pages[first : first + at_once], 1.0)
        kept = level.contains(keys)
        assert kept.index(False) == sum(kept) >= 8
    stats = level.stats()
    assert stats.stores == stats.stored + stats.known + stats.refused + stats.late


def test_copies_what_it_keeps() -> None:
    level = HostLevel(10_000)
    payload = bytearray(page_of(1).payload)
    level.store([page_of(1)._replace(payload=memoryview(payload))], 1.0)
    payload[:] = bytes(len(payload))
    assert level.load([key_of(1)], 1.0) == [page_of(1)]


def test_leaves_out_the_end_of_a_chain_that_does_not_fit() -> None:
    level = HostLevel(3 * PAGE_BYTES)
    assert level.store([page_of(n) for n in range(5)], 1.0) == 3
    assert level.contains([key_of(n) for n in range(5)]) == [True, True, True, False, False]
    assert level.stats().refused == 2


def test_takes_nothing_after_the_deadline_or_the_end() -> None:
    level = HostLevel(10_000)
    assert level.store([page_of(1)], 0.0) == 0
    assert level.stats().late == 1
    level.store([page_of(1)], 1.0)
    level.clear()
    assert level.load([key_of(1)], 1.0) == [None]
    level.close()
    level.close()
    assert level.store([page_of(1)], 1.0) == 0
    assert level.stats().num_bytes == 0


def test_needs_room() -> None:
    with pytest.raises(ConfigError):
        HostLevel(0)


def test_remembers_what_left_when_and_why() -> None:
    now = [100.0]
    level = HostLevel(2 * PAGE_BYTES, clock=lambda: now[0])
    level.store([page_of(1), page_of(2)], 1.0)
    keys = [key_of(n) for n in range(1, 5)]
    assert level.evicted(keys) == [None] * 4
    now[0] = 110.0
    level.store([page_of(3)], 1.0)
    now[0] = 112.5
    assert level.evicted(keys) == [None, Evicted(2.5, EvictionCause.ROOM), None, None]
    level.clear()
    now[0] = 113.0
    flushed = Evicted(0.5, EvictionCause.FLUSH)
    assert level.evicted(keys) == [flushed, Evicted(3.0, EvictionCause.ROOM), flushed, None]
