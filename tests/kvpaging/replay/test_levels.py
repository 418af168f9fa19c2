"""Replay with levels below the device: what they hold is found, in time, where it pays."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import IO

import pytest

from kvpaging.base.errors import ConfigError
from kvpaging.replay.cache_mode import replay_cache
from kvpaging.replay.full_mode import Limits, Simulation
from kvpaging.replay.levels import LevelSize, parse_levels
from kvpaging.replay.trace import Trace, TraceRequest, read_mooncake

MANY = 1_000_000


def first(trace: Trace, count: int) -> Trace:
    def read(file: IO[bytes]) -> Iterator[TraceRequest]:
        for request in itertools.islice(read_mooncake(file), count):
            yield dataclasses.replace(request, num_output_tokens=request.num_output_tokens % 40)

    return dataclasses.replace(trace, read=read)


def host(num_pages: int, load_token_s: float = 1e-6) -> LevelSize:
    return LevelSize("host", num_pages, load_token_s)


def disk(num_pages: int, load_token_s: float = 1e-5) -> LevelSize:
    return LevelSize("disk", num_pages, load_token_s)


def test_the_flag() -> None:
    assert [level.name for level in parse_levels("disk=20, host=5_000")] == ["host", "disk"]
    assert parse_levels("host=7@0.5") == (host(7, 0.5),)
    for text in ("", "host", "host=0", "host=x", "host=1,host=2", "tape=3", "disk=1@-1"):
        with pytest.raises(ConfigError, match="--levels"):
            parse_levels(text)


@pytest.mark.parametrize("sizes", [(host(MANY),), (disk(MANY),), (host(MANY), disk(MANY))])
def test_a_level_that_holds_all_makes_any_device_find_all(
    small: Trace, sizes: tuple[LevelSize, ...]
) -> None:
    unlimited = replay_cache(small, "lru", None)
    found = replay_cache(small, "lru", 400, sizes=sizes)
    alone = replay_cache(small, "lru", 400)
    assert alone.num_hit_pages < unlimited.num_hit_pages
    assert found.num_hit_pages == unlimited.num_hit_pages
    assert sum(found.num_level_hit_pages.values()) > 0
    assert set(found.num_level_hit_pages) == {level.name for level in sizes}


def test_a_host_level_of_some_pages_finds_what_a_larger_device_would_nearly(small: Trace) -> None:
    alone, larger = (replay_cache(small, "lru", pages) for pages in (400, 1200))
    found = replay_cache(small, "lru", 400, sizes=(host(800),))
    assert alone.num_hit_pages < found.num_hit_pages <= larger.num_hit_pages
    # Pages that came up again are in both: some of the room counts twice.
    assert found.num_hit_pages > alone.num_hit_pages + 0.6 * (
        larger.num_hit_pages - alone.num_hit_pages
    )


def test_loads_take_time_and_are_left_out_where_they_do_not_pay(small: Trace) -> None:
    def ttft(*sizes: LevelSize) -> tuple[float, int]:
        outcome = Simulation(
            first(small, 250), "lru", 250, limits=Limits(8, 2048), sizes=sizes
        ).run()
        assert outcome.num_requests == 250
        assert outcome.latencies is not None
        return outcome.latencies.ttft_p50_s, sum(outcome.num_level_hit_pages.values())

    cold_s, _ = ttft()
    fast_s, num_fast = ttft(host(MANY), disk(MANY))
    _, num_slow = ttft(disk(MANY, 1e-2))
    assert fast_s < 0.9 * cold_s
    assert num_slow < 0.5 * num_fast, "what is slower than computing was measured, and left alone"
    assert num_slow > 0
