"""Why a request found of its prompt what it found: per level, and for each run of missed pages.

Made from what a request's own keys tell: nothing in it depends on pages that it can't name, so it
says nothing of other tenants. Knows no request and no text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby
from typing import Final

import msgspec

from kvpaging.base.evictions import Evicted, EvictionCause
from kvpaging.cache.lower_levels import GUESSING, Held, LevelLoad, PagesLoaded
from kvpaging.cache.prefix_key import ChainLink

DEVICE: Final = "device"

Left = Mapping[str, Sequence[Evicted | None]]
"""By level, how long ago and why each page of a prompt left it, as far as that is remembered."""


class MissReason(StrEnum):
    """Why tokens of a prompt were computed."""

    NEVER_SEEN = "never_seen"
    """Not under these settings: not by this tenant, or longer ago than evictions are remembered."""
    OTHER_SETTINGS = "other_settings"
    """Kept under another numerics identity: other weights, KV dtype, code or device computed it."""
    NOT_THERE = "not_there"
    """Of a level that does not know whether it ever had it."""
    NOT_ASKED = "not_asked"
    """Of a level that knows only when it is asked, and was not: no time or no room for it."""
    EVICTED = "evicted"
    COMPUTING_FASTER = "computing_faster"
    """A level has it; by what was measured, computing it took less time."""
    NO_ROOM = "no_room"
    """A level has it, and there were no pages to load it into."""
    NOT_DELIVERED = "not_delivered"
    """A level should have had it, and it did not come in time and whole."""
    LAST_TOKEN = "last_token"
    """The prompt's last page: the last token's logits are needed, so it is computed."""
    SCORED = "scored"
    """The request asked for the prompt's log-probabilities, which no page holds."""
    BELOW_PAGE = "below_page"
    """The tokens after the last full page."""
    DISABLED = "disabled"
    """The server's prefix cache is off."""


class MissedRun(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of the prompt, one after the other, that were computed for the same reason."""

    reason: MissReason
    first_token: int
    num_tokens: int
    cause: EvictionCause | None = None
    """Of `EVICTED`."""
    evicted_ago_s: float | None = None
    """Of `EVICTED`: how long before the look-up the run's first page left."""
    level: str | None = None
    """Of `EVICTED`: the level that it left last."""


class LevelMatch(msgspec.Struct, frozen=True, array_like=True):
    """One level, asked for what faster levels did not have."""

    level: str
    num_pages: int
    """That came from there ..."""
    num_left: int
    """... and that were left there."""
    first_mismatch: int | None
    """The first page, of those it was asked for, that it had not; `None`: it had them all."""
    missed: tuple[MissedRun, ...] = ()
    """What it had not of what it was asked for, and why."""


class LoadNote(msgspec.Struct, frozen=True, array_like=True):
    """The choice between loading and computing, and what came of it.

    What the choice rests on is measured over all tenants, so it is not told.
    """

    num_below: int
    """Pages that were believed to be in lower levels ..."""
    num_asked: int
    """... of those, pages that were worth loading, and were asked for ..."""
    num_loaded: int
    """... and pages that came."""
    elapsed_s: float
    """That the loads took."""


class CacheExplanation(msgspec.Struct, frozen=True, array_like=True):
    """What was found for one prompt when it was first scheduled."""

    page_size: int
    num_tokens: int
    num_cached_tokens: int
    levels: tuple[LevelMatch, ...]
    missed: tuple[MissedRun, ...]
    """In order; together with the cached tokens they are the prompt."""
    load: LoadNote | None
    """`None` where no lower level had anything."""


_Why = tuple[MissReason, str | None, EvictionCause | None, float | None]
"""The reason; for an evicted page the level that it left last, why, and how long ago."""


@dataclass(slots=True)
class _Round:
    """One question to the lower levels, and the load that followed, if one did."""

    first: int
    held: tuple[Held, ...]
    num_worth: int
    is_begun: bool = False
    num_loaded: int = 0
    loads: tuple[LevelLoad, ...] = ()
    elapsed_s: float = 0.0

    @property
    def num_held(self) -> int:
        return sum(held.num_pages for held in self.held)

    def level_of(self, page: int) -> str | None:
        """The level that was believed to have this page."""
        end = self.first
        for level, num_pages in self.held:
            end += num_pages
            if self.first <= page < end:
                return level
        return None

    def givers(self) -> list[str]:
        """The level that each loaded page came from: as believed, if the levels' counts agree."""
        pages = range(self.first, self.first + self.num_loaded)
        believed = [level for page in pages if (level := self.level_of(page)) is not None]
        told = [load.level for load in self.loads for _ in range(load.num_loaded)]
        told = told[: self.num_loaded]
        return (
            believed if len(told) < self.num_loaded or Counter(told) == Counter(believed) else told
        )


@dataclass(slots=True)
class Lookup:
    """What was asked of the lower levels for one sequence that waits, and what came."""

    rounds: list[_Round] = field(default_factory=list)

    def probed(self, first: int, held: tuple[Held, ...], num_worth: int) -> None:
        """The levels were asked for the pages from `first` on.

        A question that led to no load is forgotten with the next one.
        """
        if self.rounds and not self.rounds[-1].is_begun:
            self.rounds.pop()
        self.rounds.append(_Round(first, held, num_worth))

    def begun(self) -> None:
        """The load that the last question led to has begun."""
        self.rounds[-1].is_begun = True

    def loaded(self, event: PagesLoaded) -> None:
        """That load has ended."""
        last = self.rounds[-1]
        last.num_loaded, last.loads, last.elapsed_s = (
            event.num_pages,
            event.levels,
            event.elapsed_s,
        )

    def givers(self, num_matched: int) -> dict[int, str]:
        """Of the first `num_matched` pages, which are on the device now, those loaded for it."""
        return {
            page: level
            for one in self.rounds
            for page, level in enumerate(one.givers(), one.first)
            if page < num_matched
        }

    @property
    def is_guess(self) -> bool:
        """No level that knows what it has was believed to have anything."""
        return all(held.level in GUESSING for one in self.rounds for held in one.held)

    @property
    def elapsed_s(self) -> float:
        """What its loads took."""
        return sum(one.elapsed_s for one in self.rounds)


@dataclass(frozen=True, slots=True)
class Found:
    """What `explain` needs to know of one look-up."""

    page_size: int
    num_tokens: int
    """Of the prompt."""
    num_findable_tokens: int
    """Pages may be found for what comes before the last of so many."""
    links: Sequence[ChainLink]
    """Of the prompt's full pages; empty where nothing is kept."""
    num_matched: int
    lookup: Lookup
    level_names: Sequence[str]
    """Below the device, the fastest first."""
    is_enabled: bool
    elsewhere: Mapping[int, str] = field(default_factory=dict)
    """Pages that a level has under other settings, and that level."""


def explain(found: Found, left: Left) -> CacheExplanation:
    """Say why. `left` has every page of the prompt. O(pages of the prompt)."""
    size = found.page_size
    num_cached = found.num_matched * size
    return CacheExplanation(
        page_size=size,
        num_tokens=found.num_tokens,
        num_cached_tokens=num_cached,
        levels=tuple(_levels(found, left)) if found.is_enabled else (),
        missed=tuple(_runs(found, left)),
        load=_load_note(found.lookup),
    )


def missed_pages(found: Found, left: Left) -> Counter[str]:
    """How many full pages were missed for which reason; evicted ones by their cause as well.

    `left` has every page of the prompt that was not matched.
    """
    missed: Counter[str] = Counter()
    for run in _runs(found, left):
        reason = run.reason if run.cause is None else f"{run.reason}_{run.cause}"
        missed[str(reason)] += run.num_tokens // found.page_size
    return +missed


def _levels(found: Found, left: Left) -> Iterator[LevelMatch]:
    """The device, then each level; each is asked for what those above it have not."""
    num_findable = (found.num_findable_tokens - 1) // found.page_size
    givers = found.lookup.givers(found.num_matched)
    names = [DEVICE, *found.level_names]
    where: list[str | None] = [givers.get(page, DEVICE) for page in range(found.num_matched)]
    for page in range(found.num_matched, num_findable):
        level, reason = _below(found.lookup, page)
        is_there = reason in (MissReason.COMPUTING_FASTER, MissReason.NO_ROOM)
        where.append(level if is_there else None)
    for rank, level in enumerate(names):
        slower = (None, *names[rank + 1 :])
        yield LevelMatch(
            level,
            num_pages=where[: found.num_matched].count(level),
            num_left=where[found.num_matched :].count(level),
            first_mismatch=next((p for p, at in enumerate(where) if at in slower), None),
            missed=tuple(
                _level_runs(found, level, left, [p for p, at in enumerate(where) if at in slower])
            ),
        )


def _level_runs(found: Found, level: str, left: Left, pages: Sequence[int]) -> Iterator[MissedRun]:
    """Why a level had not these pages, one run for each stretch of the same reason and cause."""
    size = found.page_size
    gone = left.get(level)
    told = [(page, *_why_not_here(found, level, gone, page)) for page in pages]
    # The difference between page and position is the same within a stretch.
    for (_, reason, cause), group in groupby(
        enumerate(told), lambda one: (one[1][0] - one[0], one[1][1], one[1][3])
    ):
        run = [one for _, one in group]
        first, _, of, _, ago_s = run[0]
        yield MissedRun(reason, first * size, len(run) * size, cause, ago_s, of)


def _why_not_here(
    found: Found, level: str, gone: Sequence[Evicted | None] | None, page: int
) -> _Why:
    """Why one level had not this page."""
    believed, reason = _below(found.lookup, page)
    if believed == level and reason in (MissReason.NOT_DELIVERED, MissReason.NOT_ASKED):
        return reason, None, None, None
    one = None if gone is None else gone[page]
    if one is not None:
        return MissReason.EVICTED, level, one.cause, one.ago_s
    if found.elsewhere.get(page) == level:
        return MissReason.OTHER_SETTINGS, None, None, None
    never = MissReason.NOT_THERE if level in GUESSING else MissReason.NEVER_SEEN
    return never, None, None, None


def _runs(found: Found, left: Left) -> Iterator[MissedRun]:
    """The missed tokens, one run for each stretch of the same reason, level and cause."""
    size = found.page_size
    num_full = found.num_tokens // size
    first = found.num_matched
    is_new = found.lookup.is_guess and not found.elsewhere and not any(map(any, left.values()))
    if found.is_enabled and is_new:
        # None is known to have had any: a new prompt of many pages is not gone through one by one.
        num_findable = max(first, (found.num_findable_tokens - 1) // size)
        if num_findable > first:
            num_tokens = (num_findable - first) * size
            yield MissedRun(MissReason.NEVER_SEEN, first * size, num_tokens)
        first = num_findable
    told = [(page, *_why(found, page, left)) for page in range(first, num_full)]
    for (reason, level, cause), group in groupby(told, lambda one: one[1:4]):
        pages = list(group)
        first, ago_s = pages[0][0], pages[0][4]
        yield MissedRun(reason, first * size, len(pages) * size, cause, ago_s, level)
    tail = found.num_tokens - num_full * size
    if tail:
        reason = MissReason.BELOW_PAGE if found.is_enabled else MissReason.DISABLED
        yield MissedRun(reason, num_full * size, tail)


def _why(found: Found, page: int, left: Left) -> _Why:
    """Why this full page was not found."""
    if not found.is_enabled:
        return MissReason.DISABLED, None, None, None
    if page >= (found.num_findable_tokens - 1) // found.page_size:
        is_last = found.num_findable_tokens >= found.num_tokens
        return MissReason.LAST_TOKEN if is_last else MissReason.SCORED, None, None, None
    if found.lookup.rounds:
        _, reason = _below(found.lookup, page)
        if reason not in (None, MissReason.NOT_THERE, MissReason.NOT_ASKED):
            return reason, None, None, None
    is_elsewhere = page in found.elsewhere
    never = MissReason.OTHER_SETTINGS if is_elsewhere else MissReason.NEVER_SEEN
    last: _Why = never, None, None, None
    last_ago_s = math.inf
    for level, gone in left.items():
        one = gone[page]
        if one is not None and one.ago_s <= last_ago_s:
            last_ago_s = one.ago_s
            last = MissReason.EVICTED, level, one.cause, one.ago_s
    return last


def _below(lookup: Lookup, page: int) -> tuple[str | None, MissReason | None]:
    """Which lower level was believed to have a page that did not come, and why it did not.

    One that guesses had it not, as far as anybody knows: it was not asked, or it was not there.
    """
    for one in reversed(lookup.rounds):
        level = one.level_of(page)
        if level is None:
            continue
        if one.is_begun and page < one.first + one.num_loaded:
            return None, None  # it came, and has left again
        is_asked = one.is_begun and page < one.first + one.num_worth
        if level in GUESSING:
            return level, MissReason.NOT_THERE if is_asked else MissReason.NOT_ASKED
        if is_asked:
            return level, MissReason.NOT_DELIVERED
        is_worth = page < one.first + one.num_worth
        return level, MissReason.NO_ROOM if is_worth else MissReason.COMPUTING_FASTER
    return None, None


def _load_note(lookup: Lookup) -> LoadNote | None:
    rounds = [one for one in lookup.rounds if one.held]
    if not rounds:
        return None
    return LoadNote(
        num_below=max(one.first + one.num_held for one in rounds) - rounds[0].first,
        num_asked=sum(one.num_worth for one in rounds if one.is_begun),
        num_loaded=sum(one.num_loaded for one in rounds),
        elapsed_s=lookup.elapsed_s,
    )
