"""Prefixes that are kept on the device whatever else needs room, up to a bound.

A pin is promised when its request comes, so that the bound is kept before anything is computed,
and kept from when the request's prompt is computed. It owns one page of each key; pins of prefixes
that begin alike share them. Pins are a tree, as prefixes are: a key is pinned while a pin ends with
it or a key after it is pinned. A shared page counts once for all, and for each tenant that pins it:
what a tenant may pin does not depend on the others' pins of the same pages.

Knows keys and the pages that hold them; who owns pages is the `CacheManager`'s business.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

import msgspec

from kvpaging.base.ids import PageId, PageKey
from kvpaging.cache.prefix_key import PrefixChain

MAX_LISTED: Final = 100_000
"""So many fit in one message between the processes."""
MIN_SWEPT: Final = 64
"""Entries of pins that have ended which may always stay in the queue of ends."""


class PinsFull(Exception):
    """A signal to the scheduler: the pin would exceed a bound. Never leaves it."""

    def __init__(self, needed: int, limit: int, pinned: int, *, is_tenants: bool):
        super().__init__(f"{needed} pages to pin, {pinned} of {limit} are pinned")
        self.needed = needed
        self.limit = limit
        self.pinned = pinned
        self.is_tenants = is_tenants
        """The bound is the tenant's, not that of all pins."""


class PinState(msgspec.Struct, frozen=True, gc=False):
    """One pin as it is now."""

    name: str
    """The id of the request that made it."""
    tenant: str
    num_pages: int
    is_kept: bool
    """False: its prompt is not computed yet."""
    ends_in_s: float | None
    """`None`: it has no end."""


class _Node:
    __slots__ = ("num_pins", "page_id", "parent")

    def __init__(self, parent: PageKey):
        self.parent = parent
        self.num_pins: dict[str, int] = {}
        """Pins that end here or after it, by tenant. It counts to the bound of each of these."""
        self.page_id: PageId | None = None


class _Pin:
    __slots__ = ("end_s", "is_kept", "key", "num_pages", "tenant", "ttl_s")

    def __init__(self, tenant: str, key: PageKey, num_pages: int, ttl_s: float | None):
        self.tenant = tenant
        self.key = key
        self.num_pages = num_pages
        self.ttl_s = ttl_s
        self.is_kept = False
        self.end_s = math.inf


class Pins:
    """All pins, by name. Costs O(pages named)."""

    def __init__(self, max_pages: int):
        self.max_pages = max_pages
        self._pins: dict[str, _Pin] = {}
        self._nodes: dict[PageKey, _Node] = {}
        self._num_by_tenant: dict[str, int] = {}
        self._kept_by_key: dict[tuple[str, PageKey], str] = {}
        """The pin that keeps a tenant's prefix: there is one at most."""
        self._owned: dict[PageId, PageKey] = {}
        self._ends: list[tuple[float, str]] = []

    def __contains__(self, name: object) -> bool:
        return name in self._pins

    def __iter__(self) -> Iterator[str]:
        return iter(self._pins)

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def num_pages(self) -> int:
        """Pages that are pinned or promised to be."""
        return len(self._nodes)

    @property
    def num_owned(self) -> int:
        """Pages that pins own now."""
        return len(self._owned)

    def owns(self, page_id: PageId) -> bool:
        """A pin is one of the page's owners."""
        return page_id in self._owned

    def states(
        self, now_s: float, *, tenant: str | None = None, name: str | None = None
    ) -> tuple[PinState, ...]:
        """The pins of this tenant, or of all, with this name, or with any: the oldest first.

        At most `MAX_LISTED`.
        """
        names = self._pins if name is None else {name} & self._pins.keys()
        wanted = ((name, self._pins[name]) for name in names)
        found = ((name, pin) for name, pin in wanted if tenant in (None, pin.tenant))
        return tuple(
            PinState(
                name,
                pin.tenant,
                pin.num_pages,
                pin.is_kept,
                None if pin.end_s == math.inf else max(0.0, pin.end_s - now_s),
            )
            for name, pin in islice(found, MAX_LISTED)
        )

    def is_promised(self, name: str) -> bool:
        """The pin is known, and its prompt is not computed yet."""
        pin = self._pins.get(name)
        return pin is not None and not pin.is_kept

    def promise(
        self,
        name: str,
        tenant: str,
        tenant_pages: int | None,
        chain: PrefixChain,
        num_pages: int,
        ttl_s: float | None,
    ) -> None:
        """Count the chain's first pages as pinned. Raises PinsFull having changed nothing."""
        if not num_pages:
            return
        known = [self._nodes.get(link.key) for link in chain.links[:num_pages]]
        num_new = known.count(None)
        if self.num_pages + num_new > self.max_pages:
            raise PinsFull(num_new, self.max_pages, self.num_pages, is_tenants=False)
        own = self._num_by_tenant.get(tenant, 0)
        num_own_new = sum(1 for node in known if node is None or tenant not in node.num_pins)
        if tenant_pages is not None and own + num_own_new > tenant_pages:
            raise PinsFull(num_own_new, tenant_pages, own, is_tenants=True)
        for i, node in enumerate(known):
            if node is None:
                node = self._nodes[chain.links[i].key] = _Node(chain.parent_of(i))
            node.num_pins[tenant] = node.num_pins.get(tenant, 0) + 1
        self._num_by_tenant[tenant] = own + num_own_new
        self._pins[name] = _Pin(tenant, chain.links[num_pages - 1].key, num_pages, ttl_s)

    def keep(
        self, name: str, chain: PrefixChain, pages: Sequence[PageId], now_s: float
    ) -> list[PageId]:
        """The pin's prompt is computed, into `pages`: gives those that the pins must own now.

        An older pin of the same prefix ends: this one takes its place, and the later end of both.
        """
        pin = self._pins[name]
        new = []
        for link, page_id in zip(chain.links[: pin.num_pages], pages, strict=False):
            node = self._nodes[link.key]
            if node.page_id is None:
                node.page_id = page_id
                self._owned[page_id] = link.key
                new.append(page_id)
        pin.is_kept = True
        if pin.ttl_s is not None:
            pin.end_s = now_s + pin.ttl_s
        older = self._kept_by_key.get((pin.tenant, pin.key))
        if older is not None:
            pin.end_s = max(pin.end_s, self._pins[older].end_s)
            self._give_up(self._pins.pop(older))  # no page: this pin needs the same ones
        self._kept_by_key[pin.tenant, pin.key] = name
        if pin.end_s < math.inf:
            self._enqueue(name, pin)
        return new

    def drop(self, name: str) -> list[PageId]:
        """End the pin: gives the pages that pins own no longer, the last one first."""
        pin = self._pins.pop(name)
        if pin.is_kept:
            del self._kept_by_key[pin.tenant, pin.key]
        return self._give_up(pin)

    def _give_up(self, pin: _Pin) -> list[PageId]:
        given_back = []
        key = pin.key
        while (node := self._nodes.get(key)) is not None:  # the root has none
            node.num_pins[pin.tenant] -= 1
            if not node.num_pins[pin.tenant]:
                del node.num_pins[pin.tenant]
                self._num_by_tenant[pin.tenant] -= 1
            if not node.num_pins:
                del self._nodes[key]
                if node.page_id is not None:
                    del self._owned[node.page_id]
                    given_back.append(node.page_id)
            key = node.parent
        if not self._num_by_tenant[pin.tenant]:
            del self._num_by_tenant[pin.tenant]
        return given_back

    def disown(self) -> list[PageId]:
        """Every kept pin ends, and no page is owned; what is promised can still be kept."""
        owned = list(self._owned)
        for key in self._owned.values():
            self._nodes[key].page_id = None
        self._owned.clear()
        for name in [name for name, pin in self._pins.items() if pin.is_kept]:
            self.drop(name)
        return owned

    @property
    def next_end_s(self) -> float | None:
        """No pin's time is over before that; `None`: never."""
        return self._ends[0][0] if self._ends else None

    def next_over(self, now_s: float) -> str | None:
        """A pin whose time is over; `None`: there is none."""
        while self._ends and self._ends[0][0] <= now_s:
            end_s, name = heapq.heappop(self._ends)
            pin = self._pins.get(name)
            if pin is not None and pin.end_s == end_s:
                return name
        return None

    def _enqueue(self, name: str, pin: _Pin) -> None:
        if len(self._ends) > 2 * len(self._pins) + MIN_SWEPT:  # pins were given up, or renewed
            self._ends = [
                (end_s, name)
                for end_s, name in self._ends
                if name in self._pins and self._pins[name].end_s == end_s
            ]
            heapq.heapify(self._ends)
        heapq.heappush(self._ends, (pin.end_s, name))
