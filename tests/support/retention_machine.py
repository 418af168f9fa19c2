"""The cache machine with pins, times, priorities, requests that store nothing, and budgets.

A shadow remembers for each key until when somebody wants it, and which prefixes are pinned.
"""

from __future__ import annotations

import math

from cache_machine import CacheMachine, Live
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from kvpaging.base.ids import PageKey
from kvpaging.cache.budgets import Budget
from kvpaging.cache.page_lease import PageLease
from kvpaging.cache.pins import PinsFull
from kvpaging.cache.retention import AS_IT_IS, Retention

RETENTIONS = st.sampled_from(
    [
        AS_IT_IS,
        Retention(store=False),
        Retention(ttl_s=2.0),
        Retention(ttl_s=5.0, priority=1),
        Retention(priority=7),
        Retention(priority=-3),
    ]
)
TENANT_PAGES = {b"": None, b"a": 4, b"b": 7}


class RetentionMachine(CacheMachine):
    next_retention = AS_IT_IS
    now = 0.0

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.next_retention = AS_IT_IS
        self.ends: dict[PageKey, float] = {}
        self.pins: dict[str, tuple[list[PageKey], float]] = {}
        self.num_pins = 0

    def terms(self, namespace: bytes) -> tuple[Retention, Budget | None]:
        budget = self.cache.budgets.of(namespace.decode(), TENANT_PAGES[namespace])
        retention, self.next_retention = self.next_retention, AS_IT_IS
        return retention, budget

    @rule(retention=RETENTIONS)
    def the_next_asks_for(self, retention: Retention) -> None:
        self.next_retention = retention

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0, 6.0]))
    def pass_time(self, seconds: float) -> None:
        self.note_uses()
        wanted = {key for key, end in self.ends.items() if end > self.now + seconds}
        before = {key for key in wanted if self.cache.index.has_key(key)}
        self.now += seconds
        self.cache.advance(self.now)
        for name in [n for n, (_, end) in self.pins.items() if end <= self.now]:
            del self.pins[name]
        assert all(self.cache.index.has_key(key) for key in before), "a page left before its time"
        for page_id in self.cache.index:
            if page_id in self.cache.policy:
                key = self.cache.index.entry(page_id).link.key
                assert self.ends[key] > self.now, "a page stayed after its time"
        # Who sleeps until then neither misses an end nor wakes for nothing for ever.
        next_end_s = self.cache.next_end_s
        assert next_end_s is None or next_end_s > self.now
        for end_s in [end_s for _, end_s in self.pins.values()]:
            assert end_s == math.inf or (next_end_s is not None and next_end_s <= end_s)
        for page_id in self.cache.index:
            key = self.cache.index.entry(page_id).link.key
            if page_id in self.cache.policy and self.cache.retained.has_end(key):
                assert next_end_s is not None
                assert next_end_s <= self.ends[key]

    @precondition(lambda self: self.live)
    @rule(data=st.data(), ttl_s=st.sampled_from([None, 4.0]), renews=st.booleans())
    def pin(self, data: st.DataObject, ttl_s: float | None, renews: bool) -> None:
        live = data.draw(st.sampled_from(self.live))
        if live.lease.is_private or not live.lease.retention.store:
            return
        name, self.num_pins = f"p{self.num_pins}", self.num_pins + 1
        before, num_before = self.snapshot(), self.cache.pins.num_pages
        tenant = live.namespace.decode()
        chain = live.chain.fork(live.num_computed)
        keys = list(chain.keys())
        try:
            self.cache.promise_pin(name, tenant, TENANT_PAGES[live.namespace], chain, ttl_s)
        except PinsFull as error:
            assert self.snapshot() == before
            assert self.cache.pins.num_pages == num_before
            assert error.pinned + error.needed > error.limit  # noqa: PT017
            return
        is_proven = live.lease.num_proven == live.lease.num_published == len(keys)
        if not keys:
            assert name not in self.cache.pins
        elif is_proven and data.draw(st.booleans()):
            self.cache.keep_pin(name, live.lease, chain)
            end = math.inf if ttl_s is None else self.now + ttl_s
            for older, (known, older_end) in tuple(self.pins.items()):
                if known == keys and older.split(":")[1] == tenant:
                    end = max(end, older_end)
                    del self.pins[older]
            self.pins[f"{name}:{tenant}"] = (keys, end)
            if renews:
                self.renew(live, tenant, ttl_s)
        else:
            self.cache.drop_pin(name)
            assert self.snapshot() == before

    def renew(self, live: Live, tenant: str, ttl_s: float | None) -> None:
        """Pin what is pinned, again and again: that never needs more, and the last one counts."""
        owned = self.cache.pins.num_owned
        for _ in range(4):
            (older,) = [name for name in self.pins if name == f"p{self.num_pins - 1}:{tenant}"]
            keys, end = self.pins.pop(older)
            name, self.num_pins = f"p{self.num_pins}", self.num_pins + 1
            chain = live.chain.fork(live.num_computed)
            self.cache.promise_pin(name, tenant, TENANT_PAGES[live.namespace], chain, ttl_s)
            self.cache.keep_pin(name, live.lease, chain)
            self.pins[f"{name}:{tenant}"] = (keys, end)
        assert self.cache.pins.num_owned == owned

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.pins)))
        del self.pins[name]
        self.note_uses()
        self.cache.drop_pin(name.split(":")[0])

    def was_flushed(self) -> None:
        self.pins.clear()
        assert not self.cache.pins.num_pages

    def was_loaded(self, lease: PageLease) -> None:
        self.note(lease)
        for page_id in lease.pages[: lease.num_published]:
            entry = self.cache.index.entry(page_id)
            if entry.link.key not in self.ends:
                self.ends[entry.link.key] = self.ends.get(entry.parent, math.inf)

    def note(self, lease: PageLease) -> None:
        end = math.inf if lease.retention.ttl_s is None else self.now + lease.retention.ttl_s
        for page_id in lease.pages[: lease.num_published] if lease.retention.store else ():
            if page_id in self.cache.index:
                key = self.cache.index.entry(page_id).link.key
                self.ends[key] = max(self.ends.get(key, 0.0), end)

    def note_uses(self) -> None:
        for live in self.live:
            self.note(live.lease)

    @invariant()
    def what_is_gone_is_wanted_by_nobody(self) -> None:
        if hasattr(self, "ends"):
            for key in [key for key in self.ends if not self.cache.index.has_key(key)]:
                del self.ends[key]
            self.note_uses()

    @invariant()
    def pinned_prefixes_are_whole(self) -> None:
        if not hasattr(self, "pins"):
            return
        pinned = {key for keys, _ in self.pins.values() for key in keys}
        assert all(self.cache.index.has_key(key) for key in pinned)
        assert self.cache.pins.num_owned == self.cache.pins.num_pages == len(pinned)
        assert len(pinned) <= self.cache.pins.max_pages
        by_tenant: dict[str, set[PageKey]] = {}
        for name, (keys, _) in self.pins.items():
            by_tenant.setdefault(name.split(":")[1], set()).update(keys)
        counted = {tenant: len(keys) for tenant, keys in by_tenant.items()}
        assert self.cache.pins._num_by_tenant == counted

    @invariant()
    def every_end_is_queued(self) -> None:
        if not hasattr(self, "pins"):
            return
        pins, retained = self.cache.pins, self.cache.retained
        queued = {(end_s, name) for end_s, name in pins._ends}
        for name, pin in pins._pins.items():
            assert pin.end_s == math.inf or (pin.end_s, name) in queued
        first: dict[PageKey, float] = {}
        for end_s, _, key in retained._queue:
            first[key] = min(end_s, first.get(key, math.inf))
        for key, mark in retained._marks.items():
            assert first.get(key, math.inf) <= mark.expires_s or mark.expires_s <= self.now

    @invariant()
    def budgets_count_what_was_taken(self) -> None:
        if not hasattr(self, "cache"):
            return
        budgets, pages = self.cache.budgets, self.cache.allocator
        counted: dict[int, int] = {}
        for page_id, budget in budgets._payers.items():
            assert pages.state(page_id) in ("held", "cached"), "somebody pays for an empty page"
            counted[id(budget)] = counted.get(id(budget), 0) + 1
            assert (page_id in budget.cached) == (page_id in self.cache.policy)
        for budget in budgets._by_tenant.values():
            assert budget.num_pages == counted.get(id(budget), 0)
        for live in self.live:
            for page_id in live.lease.pages:
                if live.namespace and pages.num_owners(page_id) == 1 and not live.num_shared:
                    payer = budgets._payers.get(page_id)
                    assert payer is None or payer is live.lease.budget

    def teardown(self) -> None:
        for name in getattr(self, "pins", ()):
            self.cache.drop_pin(name.split(":")[0])
        if hasattr(self, "cache"):
            assert not self.cache.pins.num_pages
            for live in self.live:
                self.cache.release(live.lease)
            self.live.clear()
            self.lowest_priority_goes_first()
        super().teardown()

    def lowest_priority_goes_first(self) -> None:
        cache = self.cache
        for _ in range(cache.allocator.num_free):
            cache.allocator.take(1)
        for _ in range(cache.allocator.num_cached // 2):
            left = {
                page_id: cache.retained.priority(cache.index.entry(page_id).link.key)
                for page_id in cache.index
            }
            (taken,) = cache.allocator.take(1)
            assert left[taken] == min(left.values())
        for page_id in range(1, cache.allocator.num_pages + 1):
            if cache.allocator.num_owners(page_id):  # type: ignore[arg-type]
                cache.allocator.release([page_id])  # type: ignore[list-item]
