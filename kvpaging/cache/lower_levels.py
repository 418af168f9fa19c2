"""What policy knows of the levels below the device: what is there, and the orders to move it.

Bytes move elsewhere (`kvpaging.execution.page_mover`); here are the questions and the orders, as
data. Whether a load is worth it is decided in `kvpaging.cache.load_costs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

import msgspec

from kvpaging.base.evictions import Evicted
from kvpaging.base.ids import PageId, PageKey, SeqId
from kvpaging.cache.prefix_key import ChainLink

GUESSING: Final = frozenset({"remote"})
"""Levels that know only after asking whether they have a page: a miss there is no failure, and
what was not asked for is not known to be there."""


class PageStore(msgspec.Struct, frozen=True, gc=False):
    """Copy a page down, before anything of the step that carries this order is written."""

    page_id: PageId
    parent: PageKey
    link: ChainLink
    num_uses: int
    """Sequences that sampled well from it so far; 0: it leaves the device."""

    @property
    def is_eviction(self) -> bool:
        """It leaves the device; else it was used just now."""
        return self.num_uses == 0


class PageLoad(msgspec.Struct, frozen=True, gc=False):
    """Fetch the pages of `links`, in order, into `page_ids`, which nobody else reads or writes.

    Answered by one `PagesLoaded`, within a bound, whatever happens.
    """

    seq_id: SeqId
    page_ids: tuple[PageId, ...]
    links: tuple[ChainLink, ...]


class PageTouch(msgspec.Struct, frozen=True, gc=False):
    """These pages, the beginning of a chain, are used again on the device.

    Levels that take pages at their use keep them as long as if they had been asked for them.
    Decides nothing; a `PagesLost` may answer it.
    """

    page_ids: tuple[PageId, ...]
    links: tuple[ChainLink, ...]
    num_uses: tuple[int, ...]
    """Of each, before this one: a level that takes pages after more has not missed them."""


class PagesLost(msgspec.Struct, frozen=True, tag=True):
    """A level has pages of a `PageTouch` no longer that it takes.

    They may have left the device since, and these page ids may hold others.
    """

    page_ids: tuple[PageId, ...]


class LevelFlush(msgspec.Struct, frozen=True, gc=False):
    """Empty these levels, after all stores that were ordered before. Answered by `LevelsFlushed`.

    What goes there is found again; a load under way brings what it has read.
    """

    query_id: int
    levels: tuple[str, ...]


class LevelsFlushed(msgspec.Struct, frozen=True, tag=True):
    """The levels of a `LevelFlush` are empty, or could not be emptied."""

    query_id: int
    pages: dict[str, int | None]
    """How many pages each had that is empty now, where it knows."""
    failed: tuple[str, ...] = ()
    """The levels that may have pages still."""


class LevelLoad(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one level did for a load."""

    level: str
    num_asked: int
    num_loaded: int
    elapsed_s: float


class PagesLoaded(msgspec.Struct, frozen=True, tag=True):
    """The first `num_pages` pages of a `PageLoad` are in place; the others are a miss."""

    seq_id: SeqId
    num_pages: int
    elapsed_s: float
    """From the order to its end, waiting for other loads included."""
    levels: tuple[LevelLoad, ...] = ()


class Held(NamedTuple):
    """So many pages, one after the other, are believed to be in a level."""

    level: str
    num_pages: int


class LowerLevels(Protocol):
    """Which pages are believed to be below. Asked in every step: answers at once, never waits."""

    @property
    def names(self) -> tuple[str, ...]:
        """The levels, the fastest first."""

    @property
    def store_at_uses(self) -> tuple[int, ...]:
        """Numbers of uses at which some level takes a page (write-through), ascending."""

    @property
    def wants_evicted(self) -> bool:
        """Some level takes pages that leave the device."""

    def num_storable(self) -> int:
        """How many pages one step may copy down now, besides those that leave the device."""

    def probe(self, links: Sequence[ChainLink]) -> tuple[Held, ...]:
        """Which of these pages are believed to be below, from the first on without a gap.

        Each counts for the fastest level that has it. A question.
        """

    def evicted(self, keys: Sequence[PageKey]) -> dict[str, list[Evicted | None]]:
        """By level, how long ago and why each page left it, where that is remembered.

        A question for explanations; no decision depends on it.
        """

    @property
    def other_roots(self) -> tuple[PageKey, ...]:
        """The roots of other numerics identities whose pages were found below at the start.

        Also a question for explanations, as the next one is.
        """

    def holder(self, key: PageKey) -> str | None:
        """The fastest level that knows to have this page, of whatever root."""
