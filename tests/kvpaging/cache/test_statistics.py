"""Load times by bucket: a bound belongs to its own bucket, and nothing is lost."""

from __future__ import annotations

from kvpaging.cache.lower_levels import LevelLoad
from kvpaging.cache.statistics import LOAD_BUCKETS_S, CacheCounters, LoadTimes


def test_a_bound_is_in_its_own_bucket() -> None:
    for number, bound in enumerate(LOAD_BUCKETS_S):
        times = LoadTimes()
        times.observe(bound)
        times.observe(bound * 1.0001)
        assert times.counts[number : number + 2] == [1, 1]
        assert sum(times.counts) == 2


def test_each_level_has_its_own_times() -> None:
    counters = CacheCounters()
    counters.loaded((LevelLoad("disk", 1, 1, 0.5), LevelLoad("remote", 1, 0, 9.0)))
    counters.loaded((LevelLoad("disk", 1, 1, 0.25),))
    assert {name: sum(times.counts) for name, times in counters.load_times.items()} == {
        "disk": 2,
        "remote": 1,
    }
    assert counters.load_times["disk"].sum_s == 0.75
    assert counters.load_times["remote"].counts[-1] == 1


def test_hits_are_counted_by_the_level_they_came_from() -> None:
    counters = CacheCounters()
    counters.placed(70, 48, 16, {1: "host", 2: "disk"})
    counters.placed(10, 0, 16, {})
    assert counters.hit_pages == {"device": 1, "host": 1, "disk": 1}
    assert (counters.queried_tokens, counters.hit_tokens, counters.queried_pages) == (80, 48, 4)
