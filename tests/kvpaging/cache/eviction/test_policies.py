"""What each policy is for, on streams of single pages; leaf order is the cache machine's matter."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpaging.base.ids import PageId, PageKey
from kvpaging.cache.eviction.names import POLICIES
from kvpaging.cache.eviction.policy import EvictionPolicy


def key(name: int) -> PageKey:
    return PageKey(name.to_bytes(4, "little"))


class Cache:
    """Single pages: every use is a look-up, and an insertion if that misses."""

    def __init__(self, name: str, capacity: int):
        self.policy: EvictionPolicy = POLICIES[name](capacity)
        self.capacity = capacity

    def use(self, name: int) -> bool:
        page_id = PageId(name)
        found = page_id in self.policy
        if found:
            self.policy.remove(page_id)
        elif len(self.policy) == self.capacity:
            self.policy.victim()
        self.policy.add(page_id, key(name), is_leaf=True)
        return found

    def holds(self) -> set[int]:
        return {name for name in range(200) if PageId(name) in self.policy}


def test_fifo_forgets_what_came_first_though_it_was_used() -> None:
    cache = Cache("fifo", 3)
    for name in (1, 2, 3, 1, 1, 4):
        cache.use(name)
    assert cache.holds() == {2, 3, 4}


def test_lru_keeps_what_was_used_last() -> None:
    cache = Cache("lru", 3)
    for name in (1, 2, 3, 1, 4):
        cache.use(name)
    assert cache.holds() == {1, 3, 4}


def test_lfu_keeps_what_was_used_most_and_ageing_lets_it_go() -> None:
    for policy, stays in (("lfu", True), ("lfu-ageing", False)):
        cache = Cache(policy, 3)
        for name in (1, 1, 1, 1, 2, 3, 4):
            cache.use(name)
        assert 1 in cache.holds()
        for name in range(10, 30):
            cache.use(name)
        assert (1 in cache.holds()) == stays


@pytest.mark.parametrize("policy", ["arc", "s3-fifo"])
def test_a_scan_does_not_wash_away_what_is_used_again_and_again(policy: str) -> None:
    hits = {}
    for name in (policy, "lru"):
        cache, scan, count = Cache(name, 20), 100, 0
        lot = random.Random(0)
        for _ in range(3000):
            if lot.random() < 0.3:
                count += cache.use(lot.randrange(10))
            else:
                scan += 1
                cache.use(scan)
        hits[name] = count
    assert hits[policy] > 1.1 * hits["lru"]


def test_arc_goes_over_to_recency_when_frequency_does_not_pay() -> None:
    """A loop over a little more than one list holds is found once the ghosts have spoken."""
    cache = Cache("arc", 10)
    for _ in range(5):
        for name in range(5):
            cache.use(name)  # five pages used again fill a half
    for turn in range(40):
        hits = sum(cache.use(100 + name) for name in range(8))
        if turn > 20:
            assert hits >= 7


def test_random_is_fair_and_the_same_again() -> None:
    def victims(seed: int) -> list[int]:
        from kvpaging.cache.eviction.random_choice import RandomChoice

        policy = RandomChoice(seed)
        for name in range(20):
            policy.add(PageId(name), key(name), is_leaf=name != 7)
        return [policy.victim() for _ in range(19)]

    assert victims(1) == victims(1)
    assert 7 not in victims(1)
    first = Counter(victims(seed)[0] for seed in range(1900))
    assert len(first) == 19
    assert max(first.values()) < 160


@pytest.mark.parametrize("policy", POLICIES)
@given(st.data())
def test_victims_are_cached_leaves_and_each_goes_once(policy: str, data: st.DataObject) -> None:
    pages = POLICIES[policy](8)
    inner: dict[int, bool] = {}
    serial = 0
    for _ in range(data.draw(st.integers(0, 60))):
        action = data.draw(st.sampled_from(["add", "add", "again", "expose", "victim"]))
        if action == "add" and len(inner) < 8:
            page_id = data.draw(st.sampled_from([i for i in range(8) if i not in inner]))
            serial += data.draw(st.integers(0, 1))
            # An inner page is released after its children, so leaf-blind LRU finds a leaf first.
            inner[page_id] = policy != "lru" and data.draw(st.booleans())
            pages.add(PageId(page_id), key(serial), is_leaf=not inner[page_id])
        elif action == "again" and inner:
            page_id = data.draw(st.sampled_from(sorted(inner)))
            pages.remove(PageId(page_id))
            assert PageId(page_id) not in pages
            pages.add(PageId(page_id), key(serial), is_leaf=not inner[page_id])
        elif action == "expose" and any(inner.values()):
            page_id = data.draw(st.sampled_from([i for i in sorted(inner) if inner[i]]))
            inner[page_id] = False
            pages.expose(PageId(page_id))
        elif action == "victim":
            if all(inner.values()):
                with pytest.raises(KeyError):
                    pages.victim()
            else:
                victim = pages.victim()
                assert not inner.pop(victim)
        assert len(pages) == len(inner)
        assert all((PageId(i) in pages) == (i in inner) for i in range(8))
