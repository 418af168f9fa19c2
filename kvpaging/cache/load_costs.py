"""Whether to load pages or to compute them again: by what either was measured to take.

A level's cost has three parts, kept apart: what a page takes that is there, how often a page is
there that was believed to be, and what it takes to find that nothing is. Averages fade, so that a
level that became slow is left alone, and it is tried again now and then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from kvpaging.cache.lower_levels import GUESSING, Held, LevelLoad

RETRY_S: Final = 5.0
"""A level that looks too slow is asked all the same when it was not for so long: it may have become
fast, or been filled by another server. So that costs at most one load of each level in this time.
"""
_FADE: Final = 0.8
"""What is left of the old sums when a load is added."""
_HOPE: Final = 0.1
"""Of a load: the least that a level is believed to hit, among some five loads that count."""
_MIN_TOKENS: Final = 16
"""A step of fewer tokens says little of what a prompt's token costs."""


class LevelCost(msgspec.Struct, frozen=True):
    """One level, as measured."""

    level: str
    load_s_per_page: float | None
    """`None` while no page was loaded."""
    hit_ratio: float
    """Of pages that were believed to be there and asked for; never quite 0."""
    miss_s: float
    """What a load takes that finds nothing."""


class LoadChoices(msgspec.Struct, frozen=True):
    """What the choice between loading and computing rests on, and how it went."""

    compute_s_per_token: float | None
    """`None` while no prompt was computed."""
    levels: tuple[LevelCost, ...]
    num_loads: int
    """Loads that were found worth it, in part at least."""
    num_refused: int
    """Loads that were left out since computing was found faster, of pages that a level had."""


@dataclass(slots=True)
class _Sums:
    """Of one level, fading."""

    loads: float = _HOPE
    hits: float = _HOPE
    """The shares of the loads that were there."""
    pages: float = 0.0
    load_s: float = 0.0
    """Of loads that found something."""
    misses: float = 0.0
    miss_s: float = 0.0

    def add(self, load: LevelLoad) -> None:
        self.loads = _FADE * self.loads + 1
        self.hits = _FADE * self.hits + load.num_loaded / max(1, load.num_asked)
        if load.num_loaded:
            self.pages = _FADE * self.pages + load.num_loaded
            self.load_s = _FADE * self.load_s + load.elapsed_s
        else:
            self.misses = _FADE * self.misses + 1
            self.miss_s = _FADE * self.miss_s + load.elapsed_s

    @property
    def s_per_page(self) -> float | None:
        """Seconds for a page that is there."""
        return self.load_s / self.pages if self.pages else None

    @property
    def hit_ratio(self) -> float:
        """Never 0: what was not there may have come since."""
        return max(self.hits, _HOPE) / self.loads

    @property
    def s_per_miss(self) -> float:
        """Seconds to find that nothing is there."""
        return self.miss_s / self.misses if self.misses else 0.0


class LoadCosts:
    """What loading and computing take, and which of them to do."""

    def __init__(self) -> None:
        self._compute_s_per_token: float | None = None
        self._levels: dict[str, _Sums] = {}
        self._asked_s: dict[str, float] = {}
        """When a load from the level was last begun."""
        self._num_loads = 0
        self._num_refused = 0

    @property
    def compute_s_per_token(self) -> float | None:
        """What a prompt's token is measured to take; `None` while none was."""
        return self._compute_s_per_token

    def loaded(self, loads: Iterable[LevelLoad]) -> None:
        """A load ended; what each level did for it."""
        for load in loads:
            self._levels.setdefault(load.level, _Sums()).add(load)

    def computed(self, num_tokens: int, elapsed_s: float) -> None:
        """A step computed `num_tokens` tokens in `elapsed_s`."""
        if num_tokens >= _MIN_TOKENS:
            new, old = elapsed_s / num_tokens, self._compute_s_per_token
            self._compute_s_per_token = new if old is None else _FADE * old + (1 - _FADE) * new

    def begun(self, loads: Iterable[Held], now_s: float) -> None:
        """A load of these pages has begun."""
        for load in loads:
            self._asked_s[load.level] = now_s

    def worth_loading(self, held: Sequence[Held], page_size: int, now_s: float) -> tuple[Held, ...]:
        """Which of the pages that are believed to be below to load: those up to some page.

        All of them while nothing was measured, and each `RETRY_S` to measure again.
        """
        num_worth = 0
        gain_s = best_s = 0.0
        for number, (level, num_pages) in enumerate(held, start=1):
            gain_s += self._gain_s(level, num_pages, page_size)
            if gain_s > 0 and gain_s >= best_s:
                best_s, num_worth = gain_s, number
        if any(self._is_due(each.level, now_s) for each in held[num_worth:]):
            num_worth = len(held)
        self._num_refused += any(each.level not in GUESSING for each in held[num_worth:])
        self._num_loads += num_worth > 0
        return tuple(held[:num_worth])

    def _is_due(self, level: str, now_s: float) -> bool:
        """The level was not asked for so long that it is to be measured again."""
        return now_s - self._asked_s.get(level, -math.inf) >= RETRY_S

    def choices(self) -> LoadChoices:
        """What was measured and chosen so far. Plain data."""
        return LoadChoices(
            self._compute_s_per_token,
            tuple(
                LevelCost(name, sums.s_per_page, sums.hit_ratio, sums.s_per_miss)
                for name, sums in self._levels.items()
            ),
            self._num_loads,
            self._num_refused,
        )

    def _gain_s(self, level: str, num_pages: int, page_size: int) -> float:
        """Seconds that loading these pages is expected to save; infinite while not measured."""
        sums = self._levels.get(level)
        if sums is None or self._compute_s_per_token is None:
            return float("inf")
        saved_s = page_size * self._compute_s_per_token
        if sums.s_per_page is not None:
            saved_s -= sums.s_per_page
        return sums.hit_ratio * num_pages * saved_s - (1 - sums.hit_ratio) * sums.s_per_miss
