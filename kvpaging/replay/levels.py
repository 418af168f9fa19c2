"""Levels below the device for a replay: which pages they would hold, and when a load would end.

    host     takes what leaves the device
    disk     takes pages at their first use, and hears when they are used again on the device

So they behave as the server's do by default, in pages instead of bytes, and pages leave them in the
very same order (`kvpaging.levels.chain_order`). A server's disk has its room back a segment at a
time, so it holds somewhat less at times. No page has contents here.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Final

import msgspec

from kvpaging.base.errors import ConfigError
from kvpaging.base.evictions import Evicted
from kvpaging.base.ids import PageKey
from kvpaging.cache.lower_levels import (
    Held,
    LevelLoad,
    PageLoad,
    PagesLoaded,
    PagesLost,
    PageStore,
    PageTouch,
)
from kvpaging.cache.prefix_key import ChainLink
from kvpaging.levels.chain_order import ChainOrder


class LevelSize(msgspec.Struct, frozen=True):
    """One simulated level."""

    name: str
    num_pages: int
    load_token_s: float
    """What a token's keys and values take to load."""


DEFAULT_LOAD_TOKEN_S: Final = {"host": 6.5e-6, "disk": 6.5e-5}
"""128 KiB of KV a token, as in `StepTimes`, at 20 GB/s and at 2 GB/s."""


def parse_levels(text: str) -> tuple[LevelSize, ...]:
    """`host=N,disk=N` with N pages, maybe `N@SECONDS` a loaded token. Raises ConfigError."""
    found = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        count, _, seconds = size.partition("@")
        try:
            num_pages = int(count.replace("_", ""))
            load_s = float(seconds) if seconds else DEFAULT_LOAD_TOKEN_S.get(name, 0.0)
        except ValueError:
            num_pages, load_s = 0, 0.0
        if name not in DEFAULT_LOAD_TOKEN_S or name in found or num_pages < 1 or load_s < 0:
            raise ConfigError(
                "--levels must be host=PAGES, disk=PAGES or both with a comma between, each maybe "
                f"with @SECONDS a loaded token, not {text!r}"
            )
        found[name] = LevelSize(name, num_pages, load_s)
    return tuple(found[name] for name in DEFAULT_LOAD_TOKEN_S if name in found)


class _Pages:
    """Keys, in the order in which a level loses them."""

    def __init__(self, size: LevelSize):
        self.size = size
        self.is_disk = size.name == "disk"
        self.order = ChainOrder()

    def __contains__(self, key: PageKey) -> bool:
        return key in self.order

    def store(self, pages: Sequence[tuple[PageKey, PageKey]]) -> None:
        """Keys with their parents."""
        coming = {key for key, _ in pages if key not in self.order}
        self.order.add(pages)
        while len(self.order) > self.size.num_pages and (key := self.order.first) is not None:
            if key in coming:
                self.order.refuse(key)
            else:
                self.order.remove(key)

    def has_lost(self, key: PageKey) -> bool:
        """A page that was used is not here, and not for want of room."""
        return key not in self.order and not self.order.was_refused(key)


class SimulatedLevels:
    """A `lower_levels.LowerLevels` that also carries orders out, in simulated time."""

    def __init__(self, sizes: Sequence[LevelSize], page_size: int):
        self._levels = [_Pages(size) for size in sizes]
        self._page_size = page_size
        self._loads: deque[tuple[float, PagesLoaded]] = deque()
        self._free_s = 0.0
        """When the one that loads has done what it was given."""
        self.num_hits: Counter[str] = Counter()
        """Pages found, by level."""

    @property
    def names(self) -> tuple[str, ...]:
        """The levels, the fastest first."""
        return tuple(level.size.name for level in self._levels)

    @property
    def store_at_uses(self) -> tuple[int, ...]:
        """The disk takes pages at their first use."""
        return (1,) if any(level.is_disk for level in self._levels) else ()

    @property
    def wants_evicted(self) -> bool:
        """The host takes what leaves the device."""
        return any(not level.is_disk for level in self._levels)

    def num_storable(self) -> int:
        """Writing is not simulated: as many as there are."""
        return 2**31

    def probe(self, links: Sequence[ChainLink]) -> tuple[Held, ...]:
        """As `LowerLevels.probe`."""
        return tuple(
            Held(name, len(list(run))) for name, run in groupby(self._names_of(links)) if name
        )

    def evicted(self, keys: Sequence[PageKey]) -> dict[str, list[Evicted | None]]:
        """Nothing: nobody asks for explanations here."""
        return {}

    @property
    def other_roots(self) -> tuple[PageKey, ...]:
        """Nothing, as above."""
        return ()

    def holder(self, key: PageKey) -> str | None:
        """Nothing, as above."""
        return None

    def store(self, stores: Iterable[PageStore]) -> None:
        """Carry a plan's stores out."""
        for is_eviction, orders in groupby(stores, lambda order: order.is_eviction):
            pages = [(order.link.key, order.parent) for order in orders]
            for level in self._levels:
                if level.is_disk is not is_eviction:
                    level.store(pages)

    def touch(self, touches: Iterable[PageTouch]) -> list[PagesLost]:
        """The disk hears what is used again; what it has lost of that."""
        lost = []
        for touch in touches:
            for level in self._levels:
                if level.is_disk:
                    level.order.use([link.key for link in touch.links])
                    pages = zip(touch.page_ids, touch.links, strict=True)
                    gone = tuple(page_id for page_id, link in pages if level.has_lost(link.key))
                    lost += [PagesLost(gone)] if gone else []
        return lost

    def load(self, links: Sequence[ChainLink]) -> list[LevelLoad]:
        """Find these pages, from the first on without a gap; what each level did and took."""
        done = []
        first = 0
        for name, num_pages in self.probe(links):
            [level] = [level for level in self._levels if level.size.name == name]
            level.order.use([link.key for link in links[first : first + num_pages]])
            first += num_pages
            self.num_hits[name] += num_pages
            seconds = num_pages * self._page_size * level.size.load_token_s
            done.append(LevelLoad(name, num_pages, num_pages, seconds))
        return done

    def begin(self, load: PageLoad, now_s: float) -> None:
        """Begin a load; one is done after the other."""
        done = self.load(load.links)
        self._free_s = max(self._free_s, now_s) + sum(level.elapsed_s for level in done)
        num_pages = sum(level.num_loaded for level in done)
        event = PagesLoaded(load.seq_id, num_pages, self._free_s - now_s, tuple(done))
        self._loads.append((self._free_s, event))

    @property
    def next_end_s(self) -> float | None:
        """When the next load ends."""
        return self._loads[0][0] if self._loads else None

    def completions(self, now_s: float) -> list[PagesLoaded]:
        """Loads that have ended by now, each once."""
        ended = []
        while self._loads and self._loads[0][0] <= now_s:
            ended.append(self._loads.popleft()[1])
        return ended

    def _names_of(self, links: Sequence[ChainLink]) -> Iterable[str]:
        for link in links:
            for level in self._levels:
                if link.key in level:
                    yield level.size.name
                    break
            else:
                return
