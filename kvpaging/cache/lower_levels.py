"""What policy knows of the levels below the device: what is there, and whether to fetch it.

Bytes move elsewhere (`kvpaging.execution.page_mover`); here are the orders to move them, as data,
and the measured choice between loading a page and computing it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from kvpaging.base.ids import PageId, PageKey, SeqId
from kvpaging.cache.prefix_key import ChainLink


class PageStore(msgspec.Struct, frozen=True, gc=False):
    """Copy a page down, before anything of the step that carries this order is written."""

    page_id: PageId
    parent: PageKey
    link: ChainLink
    is_eviction: bool
    """It is leaving the device; else it was just computed."""


class PageLoad(msgspec.Struct, frozen=True, gc=False):
    """Fetch the pages of `links`, in order, into `page_ids`, which nobody else reads or writes.

    Answered by one `PagesLoaded`, within a bound, whatever happens.
    """

    seq_id: SeqId
    page_ids: tuple[PageId, ...]
    links: tuple[ChainLink, ...]


class PagesLoaded(msgspec.Struct, frozen=True, tag=True):
    """The first `num_pages` pages of a `PageLoad` are in place; the others are a miss."""

    seq_id: SeqId
    num_pages: int
    elapsed_s: float


class LowerLevels(Protocol):
    """Which pages are believed to be below. Asked in every step: answers at once, never waits."""

    @property
    def wants_computed(self) -> bool:
        """Some level takes pages as soon as they are computed (write-through)."""

    @property
    def wants_evicted(self) -> bool:
        """Some level takes pages that leave the device."""

    def probe(self, links: Sequence[ChainLink]) -> int:
        """How many of these pages, from the first on, are believed to be there. A question."""


class LoadCosts:
    """Seconds that a page costs to load and to compute, as measured; decides which to do.

    Exponential averages, so that a level that became slow is left alone, and is tried again now
    and then.
    """

    RETRY_EVERY = 32
    """One in so many loads that look too slow is made all the same, to measure again."""
    _WEIGHT = 0.2

    def __init__(self) -> None:
        self.load_s_per_page: float | None = None
        self.compute_s_per_token: float | None = None
        self._num_refused = 0

    def loaded(self, num_pages: int, elapsed_s: float) -> None:
        """A load of `num_pages` (or a miss: 0) took `elapsed_s`."""
        self.load_s_per_page = self._mean(self.load_s_per_page, elapsed_s / max(1, num_pages))

    def computed(self, num_tokens: int, elapsed_s: float) -> None:
        """A step computed `num_tokens` tokens in `elapsed_s`. Steps of few tokens say little."""
        if num_tokens >= 16:
            self.compute_s_per_token = self._mean(self.compute_s_per_token, elapsed_s / num_tokens)

    def is_worth_loading(self, num_pages: int, page_size: int) -> bool:
        """Whether loading is believed faster than computing. True while nothing was measured."""
        if not num_pages:
            return False
        if self.load_s_per_page is None or self.compute_s_per_token is None:
            return True
        if self.load_s_per_page <= page_size * self.compute_s_per_token:
            return True
        self._num_refused += 1
        return self._num_refused % self.RETRY_EVERY == 0

    def _mean(self, old: float | None, new: float) -> float:
        return new if old is None else old + self._WEIGHT * (new - old)
