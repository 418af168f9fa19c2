"""What a cache counts: plain totals, made in the engine and shown elsewhere.

Counted once a request or once a load, never once a token. Knows no clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from kvpaging.cache.explanation import DEVICE
from kvpaging.cache.lower_levels import LevelLoad

LOAD_BUCKETS_S: Final = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025),
    *(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
)
"""Upper bounds of a `LoadTimes` histogram's buckets; one more has all that took longer."""


class LoadTimes(msgspec.Struct, array_like=True):
    """How long one level took for its part of a load, whatever came of it."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (len(LOAD_BUCKETS_S) + 1))
    """Loads by bucket; not cumulative."""
    sum_s: float = 0.0

    def observe(self, elapsed_s: float) -> None:
        """One more load."""
        self.counts[bisect_left(LOAD_BUCKETS_S, elapsed_s)] += 1
        self.sum_s += elapsed_s


@dataclass(slots=True)
class CacheCounters:
    """Totals since the start. A request is counted when it is first placed."""

    queried_tokens: int = 0
    hit_tokens: int = 0
    queried_pages: int = 0
    """Full pages of prompts."""
    hit_pages: Counter[str] = field(default_factory=Counter)
    """By the level that they came from."""
    missed_pages: Counter[str] = field(default_factory=Counter)
    """By reason: a `MissReason`, and for evicted ones the cause behind it."""
    saved_s: float = 0.0
    """Computing what was found would have taken so much longer than loading it did. By what was
    measured; a load that was slower than computing counts against it."""
    load_times: dict[str, LoadTimes] = field(default_factory=dict)

    def placed(
        self,
        num_tokens: int,
        num_cached_tokens: int,
        page_size: int,
        loaded: Mapping[int, str],
    ) -> None:
        """A request was placed; `loaded` has the matched pages that were loaded for it."""
        self.queried_tokens += num_tokens
        self.hit_tokens += num_cached_tokens
        self.queried_pages += num_tokens // page_size
        self.hit_pages[DEVICE] += num_cached_tokens // page_size - len(loaded)
        if loaded:
            self.hit_pages.update(loaded.values())

    def loaded(self, loads: Iterable[LevelLoad]) -> None:
        """A load ended; what each level did for it."""
        for load in loads:
            self.load_times.setdefault(load.level, LoadTimes()).observe(load.elapsed_s)
