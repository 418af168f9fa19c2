"""A state machine over allocator, index and leases with shadow memory.

For each slot it remembers which (namespace, prefix) was written there, and compares at every step
what each sequence would read: counting pages misses aliasing, this does not. Two-letter alphabet,
tiny pages, tiny pools: faults show fastest there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvpaging.base.errors import LawBroken
from kvpaging.cache.allocator import OutOfPages
from kvpaging.cache.audit import Audit
from kvpaging.cache.budgets import Budget
from kvpaging.cache.cache_manager import CacheManager
from kvpaging.cache.eviction.names import DEFAULT_POLICY, POLICIES
from kvpaging.cache.page_lease import PageLease
from kvpaging.cache.prefix_key import PrefixChain, SharedPrefix
from kvpaging.cache.retention import AS_IT_IS, Retention

TOKENS = st.integers(1, 2)


@dataclass(eq=False)
class Live:
    namespace: bytes
    tokens: list[int]
    chain: PrefixChain
    lease: PageLease
    num_computed: int
    num_shared: int

    def owner(self, position: int, page_size: int) -> bytes:
        """Whose page a token is in."""
        end = (position // page_size + 1) * page_size
        return b"shared" if end <= self.num_shared else self.namespace


class CacheMachine(RuleBasedStateMachine):
    policy = DEFAULT_POLICY

    @initialize(
        page_size=st.integers(1, 4), num_pages=st.integers(6, 24), max_pinned=st.integers(0, 8)
    )
    def start(self, page_size: int, num_pages: int, max_pinned: int) -> None:
        self.cache = CacheManager(
            num_pages,
            page_size,
            policy=partial(POLICIES[self.policy], num_pages),
            max_pinned_pages=min(max_pinned, num_pages // 2),
        )
        self.size = page_size
        self.live: list[Live] = []
        self.memory: dict[int, tuple[bytes, tuple[int, ...]]] = {}

    def slot(self, live: Live, position: int) -> int:
        return live.lease.pages[position // self.size] * self.size + position % self.size

    def compute(self, live: Live, end: int) -> None:
        """What the device does: write the new tokens' slots; the last one's logits are sampled."""
        for position in range(live.num_computed, end):
            self.memory[self.slot(live, position)] = (
                live.owner(position, self.size),
                tuple(live.tokens[: position + 1]),
            )
        live.num_computed = end
        live.chain.extend(live.tokens)
        self.cache.commit(live.lease, live.chain, end)
        if end == len(live.tokens):
            self.cache.prove(live.lease, live.chain)

    def terms(self, namespace: bytes) -> tuple[Retention, Budget | None]:
        """How long the pages of who arrives shall stay, and who pays for them."""
        return AS_IT_IS, None

    def was_loaded(self, lease: PageLease) -> None:
        """A request found these pages, here and below."""

    def snapshot(self) -> tuple[object, ...]:
        pages = self.cache.allocator
        return (
            pages.num_free,
            pages.num_cached,
            pages.num_held,
            len(self.cache.index),
            tuple(pages.num_owners(p) for p in range(1, pages.num_pages + 1)),  # type: ignore[arg-type]
            [list(live.lease.pages) for live in self.live],
        )

    @rule(
        namespace=st.sampled_from([b"", b"a", b"b"]),
        tokens=st.lists(TOKENS, min_size=1, max_size=12),
        chunk=st.integers(1, 12),
        num_shared=st.sampled_from([0, 0, 3, 4, 8]),
    )
    def arrive(self, namespace: bytes, tokens: list[int], chunk: int, num_shared: int) -> None:
        num_shared = min(num_shared, len(tokens))
        chain = self.cache.chain(namespace, SharedPrefix(b"shared", num_shared))
        chain.extend(tokens)
        before = self.snapshot()
        matched = self.cache.match(chain, len(tokens))
        cached = len(matched) * self.size
        assert self.snapshot() == before, "a question changed something"
        assert cached < len(tokens), "the last token's logits are needed"
        end = min(len(tokens), cached + chunk)
        try:
            lease = self.cache.reserve(matched, end, *self.terms(namespace))
        except OutOfPages:
            assert self.snapshot() == before, "a failed operation changed something"
            return
        assert lease.num_cached_tokens == cached
        live = Live(namespace, list(tokens), chain, lease, cached, num_shared)
        self.live.append(live)
        self.compute(live, end)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=TOKENS)
    def advance(self, data: st.DataObject, token: int) -> None:
        live = data.draw(st.sampled_from(self.live))
        if live.num_computed == len(live.tokens):
            live.tokens.append(token)
        end = data.draw(st.integers(live.num_computed + 1, len(live.tokens)))
        before = self.snapshot()
        try:
            self.cache.grow(live.lease, end)
        except OutOfPages:
            assert self.snapshot() == before
            return
        self.compute(live, end)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        live = data.draw(st.sampled_from(self.live))
        before = self.snapshot()
        try:
            lease, source = self.cache.fork(live.lease, live.num_computed)
        except OutOfPages:
            assert self.snapshot() == before
            return
        if source is not None:
            target = lease.pages[-1]
            for offset in range(self.size):
                value = self.memory.get(source * self.size + offset)
                if value is not None:
                    self.memory[target * self.size + offset] = value
            self.cache.unpin(source)
        tokens = live.tokens[: live.num_computed]
        chain, num_computed = live.chain.fork(len(tokens)), len(tokens)
        self.live.append(Live(live.namespace, tokens, chain, lease, num_computed, live.num_shared))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """Its logits were no numbers: nothing that nobody else sampled well from is found again."""
        live = data.draw(st.sampled_from(self.live))
        self.live.remove(live)
        self.cache.distrust(live.lease)
        self.cache.release(live.lease)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), come=st.integers(0, 3))
    def load(self, data: st.DataObject, come: int) -> None:
        """Pages of a prefix come back from below, some of them, into pages reserved for them."""
        like = data.draw(st.sampled_from(self.live))
        chain = like.chain.fork(len(like.tokens))
        matched = self.cache.match(chain, len(like.tokens))
        links = chain.links[len(matched) :]
        num_tokens = (len(matched) + len(links)) * self.size
        try:
            lease = self.cache.reserve(matched, num_tokens, *self.terms(like.namespace))
        except OutOfPages:
            return
        come = min(come, len(links))
        for position in range(len(matched) * self.size, (len(matched) + come) * self.size):
            slot = lease.pages[position // self.size] * self.size + position % self.size
            owner = like.owner(position, self.size)
            self.memory[slot] = (owner, tuple(like.tokens[: position + 1]))
        self.cache.commit_loaded(lease, chain, come)
        self.was_loaded(lease)
        self.cache.release(lease)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        live = data.draw(st.sampled_from(self.live))
        self.live.remove(live)
        self.cache.release(live.lease)
        with pytest.raises(LawBroken):
            self.cache.release(live.lease)

    @rule()
    def flush(self) -> None:
        """Nothing is found any more; whoever runs keeps its pages, and is found by nobody."""
        num_found = len(self.cache.index)
        assert self.cache.flush() == num_found
        assert not len(self.cache.index)
        assert self.cache.allocator.num_cached == 0
        assert all(live.lease.is_private for live in self.live)
        self.was_flushed()

    def was_flushed(self) -> None:
        """For machines that know more."""

    @invariant()
    def nobody_finds_a_private_page(self) -> None:
        for live in getattr(self, "live", ()):
            if live.lease.is_private:
                assert not any(page_id in self.cache.index for page_id in live.lease.pages)

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for live in getattr(self, "live", ()):
            for position in range(live.num_computed):
                assert self.memory[self.slot(live, position)] == (
                    live.owner(position, self.size),
                    tuple(live.tokens[: position + 1]),
                )

    @invariant()
    def counts_are_conserved(self) -> None:
        if not hasattr(self, "cache"):
            return
        pages = self.cache.allocator
        assert pages.num_free + pages.num_cached + pages.num_held == pages.num_pages
        owners: dict[int, int] = {}
        for live in self.live:
            for page_id in live.lease.pages:
                owners[page_id] = owners.get(page_id, 0) + 1
        for page_id in range(1, pages.num_pages + 1):
            is_pinned = self.cache.pins.owns(page_id)  # type: ignore[arg-type]
            assert pages.num_owners(page_id) == owners.get(page_id, 0) + is_pinned  # type: ignore[arg-type]
        assert pages.num_owners(0) == 0  # type: ignore[arg-type]

    @invariant()
    def indexed_pages_are_full_right_and_reachable(self) -> None:
        if not hasattr(self, "cache"):
            return
        index = self.cache.index
        for page_id in index:
            entry = index.entry(page_id)
            written = [self.memory[page_id * self.size + o] for o in range(self.size)]
            assert len({namespace for namespace, _ in written}) == 1
            packed = b"".join(p[-1].to_bytes(4, "little") for _, p in written)
            assert packed == entry.link.tokens
            if page_id in self.cache.policy:
                assert entry.parent == self.cache.root or index.has_key(entry.parent)

    @invariant()
    def a_cached_page_is_the_only_one_of_its_key(self) -> None:
        if not hasattr(self, "cache"):
            return
        for page_id in self.cache.index:
            if page_id in self.cache.policy:
                key = self.cache.index.entry(page_id).link.key
                assert self.cache.index.pages_of(key) == (page_id,)

    @invariant()
    def the_audit_agrees(self) -> None:
        if hasattr(self, "cache"):
            audit = Audit(self.cache)
            audit.check_counts()
            for _ in self.live:
                audit.check_next_lease()
            while audit.check_idle_slice():
                pass
            assert not audit.breaches

    def teardown(self) -> None:
        for live in getattr(self, "live", ()):
            self.cache.release(live.lease)
        if hasattr(self, "cache"):
            assert self.cache.allocator.num_held == 0
            # Whatever the policy, all of it can be evicted, and never a parent before its child.
            while self.cache.allocator.num_available:
                self.cache.allocator.take(1)
                self.indexed_pages_are_full_right_and_reachable()
            assert not len(self.cache.index)
