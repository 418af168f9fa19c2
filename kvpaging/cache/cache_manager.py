"""The pages of all sequences: `reserve`, `grow`, `commit`, `fork`, `release`.

Composes the allocator, the prefix index and the eviction policy, and is the only one that changes
them. Knows sequences only as chains of tokens and as leases; knows no queue and no tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Final

from kvpaging.base.errors import LawBroken
from kvpaging.base.evictions import Evicted, EvictionCause, EvictionLog
from kvpaging.base.ids import PageId, PageKey
from kvpaging.cache.allocator import OutOfPages, PageAllocator
from kvpaging.cache.budgets import Budget, Budgets
from kvpaging.cache.eviction.by_priority import ByPriority
from kvpaging.cache.eviction.lru import LeastRecentlyUsed
from kvpaging.cache.eviction.policy import EvictionPolicy
from kvpaging.cache.explanation import (
    DEVICE,
    CacheExplanation,
    Found,
    Lookup,
    explain,
    missed_pages,
)
from kvpaging.cache.lower_levels import Held, LowerLevels, PagesLost, PageStore, PageTouch
from kvpaging.cache.page_lease import PageLease
from kvpaging.cache.pins import Pins
from kvpaging.cache.prefix_index import PrefixIndex
from kvpaging.cache.prefix_key import ChainLink, PrefixChain, SharedPrefix, root_key
from kvpaging.cache.retained import RetainedKeys
from kvpaging.cache.retention import AS_IT_IS, Retention
from kvpaging.cache.statistics import CacheCounters
from kvpaging.cache.store_queue import StoreQueue

MAX_OVER: Final = 1024
"""Pages whose time is over that are looked at in one step."""
MAX_ELSEWHERE: Final = 4096
"""Pages of a prompt that an explanation looks for under each of the other settings."""
MAX_EMPTIED: Final = 1024
"""Pages that a flush gives up in one step."""


class _CachedPages:
    """`allocator.CachedPages` over the index (what is worth keeping) and the policy (the order).

    A cached page is the only one of its key: a twin that some sequence owns serves as well, and
    goes later. So a cached page's children are cached too, and some cached page is a leaf.
    """

    def __init__(
        self,
        index: PrefixIndex,
        policy: EvictionPolicy,
        evictions: EvictionLog,
        stores: StoreQueue,
        retained: RetainedKeys,
        budgets: Budgets,
    ):
        self.unproven: set[PageKey] = set()
        """Published keys that no finite logits were sampled from yet. Their pages have owners."""
        self.num_uses: dict[PageKey, int] = {}
        """How many sequences sampled well from a published key, where it is counted."""
        self.exposed: list[PageId] = []
        """Cached pages whose time is over and that became leaves: to be given up."""
        self.doomed: list[PageId] = []
        """What a flush has still to give up: nobody finds it, and no level gets it."""
        self._retained = retained
        self._budgets = budgets
        self._stores = stores
        self._index = index
        self._policy = policy
        self._evictions = evictions

    def __len__(self) -> int:
        return len(self._policy)

    def __contains__(self, page_id: PageId) -> bool:
        return page_id in self._policy

    def keep(self, page_id: PageId) -> bool:
        is_kept = page_id in self._index and self._keep_published(page_id)
        if self._budgets and not is_kept:
            self._budgets.clear(page_id)
        return is_kept

    def _keep_published(self, page_id: PageId) -> bool:
        key = self._index.entry(page_id).link.key
        is_leaf = not self._index.has_children(key)
        is_over = is_leaf and self._retained.is_over(key)
        if is_over:
            self._evictions.add(key, EvictionCause.EXPIRED)
        if is_over or key in self.unproven or len(self._index.pages_of(key)) > 1:
            self.withdraw(page_id)
            return False
        self._policy.add(page_id, key, is_leaf=is_leaf)
        if self._budgets:
            self._budgets.keep(page_id, self._retained.priority(key), is_leaf=is_leaf)
        return True

    def revive(self, page_id: PageId) -> None:
        self._policy.remove(page_id)
        if self._budgets:
            self._budgets.revive(page_id)

    def evict(self) -> PageId:
        page_id = self._policy.victim()
        if self._budgets:
            self._budgets.revive(page_id)
            self._budgets.clear(page_id)
        self.lose(page_id, EvictionCause.ROOM)
        return page_id

    def lose(self, page_id: PageId, cause: EvictionCause) -> None:
        """What this page holds leaves the device, to another level where one wants it."""
        parent, link = self._index.entry(page_id)
        if not self.doomed and not self._retained.has_end(link.key):
            self._stores.evicted(PageStore(page_id, parent, link, num_uses=0))
        self.withdraw(page_id)
        self._evictions.add(link.key, cause)

    def withdraw(self, page_id: PageId) -> None:
        """The page no longer holds what was published; its parent may be a leaf now."""
        parent, link = self._index.entry(page_id)
        self._stores.withdrawn(page_id)
        self._index.withdraw(page_id)
        if not self._index.has_key(link.key):
            self.unproven.discard(link.key)
            self.num_uses.pop(link.key, None)
            if self._retained:
                self._retained.forget(link.key)
        if not self._index.has_children(parent):
            for parent_id in self._index.pages_of(parent):
                if parent_id in self._policy:
                    self._expose(parent_id, parent)

    def _expose(self, page_id: PageId, key: PageKey) -> None:
        self._policy.expose(page_id)
        if self._budgets:
            self._budgets.expose(page_id)
        if self._retained.is_over(key):
            self.exposed.append(page_id)


class CacheManager:
    """Pages for sequences, found again by prefix."""

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        numerics_identity: bytes = b"",
        prefix_cache: bool = True,
        policy: Callable[[], EvictionPolicy] = LeastRecentlyUsed,
        levels: LowerLevels | None = None,
        max_pinned_pages: int = 0,
    ):
        self.page_size = page_size
        self.index = PrefixIndex()
        self.counters = CacheCounters()
        self.evictions = EvictionLog()
        self.retained = RetainedKeys()
        self.budgets = Budgets()
        self.pins = Pins(max_pinned_pages)
        self.policy = ByPriority(policy, self.retained.priority)
        self._stores = StoreQueue(levels)
        self._touches: list[PageTouch] = []
        self._cached = _CachedPages(
            self.index, self.policy, self.evictions, self._stores, self.retained, self.budgets
        )
        self.allocator = PageAllocator(num_pages, self._cached)
        self._levels = levels
        self._store_at_uses = () if levels is None else levels.store_at_uses
        self._counts_uses = bool(self._store_at_uses) and self._store_at_uses[-1] > 1
        self.leases: dict[int, PageLease] = {}
        self.root: PageKey = root_key(numerics_identity)
        self._prefix_cache = prefix_cache

    def advance(self, now_s: float) -> None:
        """The time is so now: pins and pages whose time is over go, leaves first, and flushed ones.

        Never more than `MAX_OVER` and `MAX_EMPTIED` pages a call; others go with the next ones.
        """
        self.retained.now_s = self.evictions.now_s = now_s
        self._empty_some()
        while (name := self.pins.next_over(now_s)) is not None:
            self.drop_pin(name)
        for _ in range(MAX_OVER if self.retained else 0):
            key = self.retained.next_over()
            if key is None:
                break
            self._cached.exposed.extend(self.index.pages_of(key))
        while self._cached.exposed:
            self._give_up_over(self._cached.exposed.pop())

    @property
    def next_end_s(self) -> float | None:
        """When `advance` has something to do again, at the earliest; `None`: not by itself."""
        ends = (self.pins.next_end_s, self.retained.next_end_s)
        return min((end for end in ends if end is not None), default=None)

    def _give_up_over(self, page_id: PageId) -> None:
        """Give the page up if it is a cached leaf whose time is over; that may expose another."""
        if page_id in self._cached:
            key = self.index.entry(page_id).link.key
            if self.retained.is_over(key) and not self.index.has_children(key):
                self.discard(page_id)
                self.evictions.add(key, EvictionCause.EXPIRED)

    @property
    def num_available(self) -> int:
        """Pages that can be handed out now, by evicting cached ones if need be."""
        return self.allocator.num_available

    @property
    def level_names(self) -> tuple[str, ...]:
        """Of the levels below the device, the fastest first."""
        return () if self._levels is None else self._levels.names

    @property
    def has_levels(self) -> bool:
        """Pages may be found below the device."""
        return self._levels is not None and self._prefix_cache

    def chain(self, namespace: bytes, shared: SharedPrefix | None = None) -> PrefixChain:
        """An empty chain for a sequence of this namespace, maybe after a shared beginning."""
        return PrefixChain(self.root, namespace, self.page_size, shared)

    def num_unhashed(self, chain: PrefixChain, num_tokens: int) -> int:
        """Links that `extend` would add for the sequence's `num_tokens` tokens. A question."""
        return chain.num_missing(num_tokens) if self._prefix_cache else 0

    def extend(
        self, chain: PrefixChain, token_ids: Sequence[int], max_pages: int | None = None
    ) -> None:
        """Add the links of all pages that the sequence's tokens fill, where anybody will ask.

        With `max_pages` only of so many more.
        """
        if self._prefix_cache:
            chain.extend(token_ids, max_pages)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def match(self, chain: PrefixChain, num_tokens: int) -> list[PageId]:
        """Pages that already hold the beginning of a sequence of `num_tokens` tokens. A question.

        At least the last token is left to compute: its logits are needed.
        """
        if not self._prefix_cache or self.is_emptying:
            return []
        return self.index.match(chain, (num_tokens - 1) // self.page_size)

    def num_new_pages(self, matched: list[PageId], num_tokens: int) -> int:
        """Available pages that holding `num_tokens` tokens on top of `matched` would use up.

        A matched page without an owner counts too: sharing it makes it unavailable. A question.
        """
        revived = sum(1 for page_id in matched if page_id in self.policy)
        return self.pages_for(num_tokens) - len(matched) + revived

    def held_below(self, chain: PrefixChain, num_matched: int, num_tokens: int) -> tuple[Held, ...]:
        """The pages after the matched ones that are believed to be in lower levels. A question."""
        if self._levels is None or not self.has_levels or self.is_emptying:
            return ()
        return self._levels.probe(chain.links[num_matched : (num_tokens - 1) // self.page_size])

    def found(
        self,
        chain: PrefixChain,
        num_tokens: int,
        num_findable_tokens: int,
        num_matched: int,
        lookup: Lookup,
    ) -> Found:
        """What was found of a prompt of `num_tokens` tokens, for the two questions below."""
        return Found(
            page_size=self.page_size,
            num_tokens=num_tokens,
            num_findable_tokens=num_findable_tokens,
            links=chain.links,
            num_matched=num_matched,
            lookup=lookup,
            level_names=self.level_names,
            is_enabled=self._prefix_cache,
        )

    def missed_pages(self, found: Found) -> Counter[str]:
        """How many pages of a prompt were missed, by reason. A question; O(pages missed)."""
        return missed_pages(found, self._left(found.links, found.num_matched))

    def explain(self, found: Found, chain: PrefixChain) -> CacheExplanation:
        """Why so much of the chain's prompt was found, and not more. A question."""
        elsewhere = _elsewhere(self._levels, chain, found.num_matched) if self._levels else {}
        return explain(replace(found, elsewhere=elsewhere), self._left(found.links, 0))

    def _left(self, links: Sequence[ChainLink], first: int) -> dict[str, list[Evicted | None]]:
        """By level, how each of these pages from `first` on left it."""
        keys = [link.key for link in links[first:]]
        gone = {DEVICE: self.evictions.ages(keys, self.evictions.now_s)}
        if keys and self._levels is not None:
            gone |= self._levels.evicted(keys)
        unasked: list[Evicted | None] = [None] * min(first, len(links))
        return {level: unasked + found for level, found in gone.items()}

    def reserve(
        self,
        matched: list[PageId],
        num_tokens: int,
        retention: Retention = AS_IT_IS,
        budget: Budget | None = None,
    ) -> PageLease:
        """A lease over `matched` (from `match`, just now) and new pages up to `num_tokens` tokens.

        Raises OutOfPages having changed nothing.
        """
        needed = self.num_new_pages(matched, num_tokens)
        if needed > self.num_available:
            raise OutOfPages(needed, self.num_available)
        self.allocator.share(matched)
        taken = self._take(self.pages_for(num_tokens) - len(matched), budget)
        if self.retained or retention != AS_IT_IS:
            self._ask(matched, retention)
        return self._lease([*matched, *taken], len(matched), retention, budget)

    def touch(self, chain: PrefixChain, matched: Sequence[PageId]) -> None:
        """A sequence was placed on these pages: levels that keep what is used shall hear of it."""
        if matched and self._store_at_uses:
            links = tuple(chain.links[: len(matched)])
            num_uses: tuple[int, ...] = (1,) * len(links)
            if self._counts_uses:
                num_uses = tuple(self._cached.num_uses.get(link.key, 0) for link in links)
            self._touches.append(PageTouch(tuple(matched), links, num_uses))

    def take_touches(self) -> tuple[PageTouch, ...]:
        """What was used again since the last call."""
        taken, self._touches = tuple(self._touches), []
        return taken

    def store_again(self, lost: PagesLost) -> None:
        """Copy down what a level has lost, where it is on the device still and may go down."""
        for page_id in () if self.is_emptying else lost.page_ids:
            if page_id in self.index:
                parent, link = self.index.entry(page_id)
                is_proven = link.key not in self._cached.unproven
                if is_proven and not self.retained.has_end(link.key):
                    num_uses = self._cached.num_uses.get(link.key, 1)
                    self._stores.add(PageStore(page_id, parent, link, num_uses))

    def _take(self, num_pages: int, budget: Budget | None) -> list[PageId]:
        """New pages. Who pays for more than it may gives its own cached ones up first."""
        if budget is None or num_pages > self.num_available:
            return self.allocator.take(num_pages)
        for _ in range(budget.num_over(num_pages)):
            if not budget.cached.has_leaf:
                break
            page_id = budget.cached.first()
            self._cached.lose(page_id, EvictionCause.BUDGET)
            self._free(page_id)
        taken = self.allocator.take(num_pages)
        self.budgets.charge(taken, budget)
        return taken

    def _ask(self, pages: Sequence[PageId], retention: Retention) -> None:
        """A request uses published pages and says for how long.

        One that stores nothing says nothing.
        """
        for page_id in pages if retention.store else ():
            if page_id in self.index:
                self.retained.ask(self.index.entry(page_id).link.key, retention, is_new=False)

    def grow(self, lease: PageLease, num_tokens: int) -> tuple[PageId, ...]:
        """Make room for `num_tokens` tokens in all; returns the pages appended to the lease.

        Raises OutOfPages having changed nothing.
        """
        missing = self.pages_for(num_tokens) - len(lease.pages)
        if missing <= 0:
            return ()
        taken = self._take(missing, lease.budget)
        lease.pages.extend(taken)
        return tuple(taken)

    def commit(self, lease: PageLease, chain: PrefixChain, num_computed_tokens: int) -> None:
        """Publish the pages that are full and computed now. `chain` covers them.

        Others may share them at once, but they outlive their owners, and go down to other levels,
        only once they are proven.
        """
        if not self._prefix_cache or not lease.retention.store or lease.is_private:
            return
        self._publish(lease, chain, num_computed_tokens // self.page_size, is_proven=False)

    def commit_loaded(self, lease: PageLease, chain: PrefixChain, num_pages: int) -> None:
        """Publish `num_pages` more pages, which came from a lower level: they were proven once.

        Where what goes before them is not, they are worth nothing without it.
        """
        if lease.is_private:
            return
        first = lease.num_published
        parent = chain.parent_of(first)
        self._publish(
            lease, chain, first + num_pages, is_proven=parent not in self._cached.unproven
        )
        if self._counts_uses:
            for link in chain.links[first : first + num_pages]:
                self._cached.num_uses.setdefault(link.key, 1)  # by who computed it, once

    def prove(self, lease: PageLease, chain: PrefixChain) -> None:
        """Finite logits were sampled from all of the lease's pages: what they hold is good.

        Each of them is used once more by that, and goes down where that makes uses enough.
        """
        for i in () if lease.is_private else range(lease.num_proven, lease.num_published):
            page_id, parent, link = lease.pages[i], chain.parent_of(i), chain.links[i]
            is_new = page_id not in self.index
            if is_new:  # another reader failed, and withdrew it
                self._publish_page(lease, page_id, parent, link)
            elif link.key in self._cached.unproven:
                self._cached.unproven.discard(link.key)
                is_new = True
            if is_new or self._counts_uses:
                self._use(page_id, parent, link)
        lease.num_proven = lease.num_published

    def _use(self, page_id: PageId, parent: PageKey, link: ChainLink) -> None:
        """A sequence sampled well from the page."""
        num_uses = 1
        if self._counts_uses:
            num_uses += self._cached.num_uses.get(link.key, 0)
            self._cached.num_uses[link.key] = num_uses
        if num_uses in self._store_at_uses and not self.retained.has_end(link.key):
            self._stores.add(PageStore(page_id, parent, link, num_uses))

    def _publish(
        self, lease: PageLease, chain: PrefixChain, num_pages: int, *, is_proven: bool
    ) -> None:
        """Say of the lease's first `num_pages` pages that they hold the chain's links."""
        for i in range(lease.num_published, num_pages):
            link = chain.links[i]
            if not is_proven and not self.index.has_key(link.key):
                self._cached.unproven.add(link.key)
            self._publish_page(lease, lease.pages[i], chain.parent_of(i), link)
            lease.num_published = i + 1

    def _publish_page(
        self, lease: PageLease, page_id: PageId, parent: PageKey, link: ChainLink
    ) -> None:
        twins = self.index.pages_of(link.key)
        self.index.publish(page_id, parent, link)
        for twin in twins:
            if twin in self._cached:
                self.discard(twin)
        if self.retained or lease.retention != AS_IT_IS:
            if lease.retention.store:
                self.retained.ask(link.key, lease.retention, is_new=not twins)
            elif not twins:  # it came from below: nobody says how long it shall stay here
                self.retained.inherit(link.key, parent)

    @property
    def has_stores(self) -> bool:
        """Pages wait to be copied down."""
        return len(self._stores) > 0

    def take_stores(self) -> tuple[PageStore, ...]:
        """Orders to copy pages down, as many as one step should carry out.

        They must be carried out before anything else is written: some of the pages are taken again.
        """
        return self._stores.take()

    def fork(self, lease: PageLease, num_tokens: int) -> tuple[PageLease, PageId | None]:
        """A lease over the same first `num_tokens` tokens: full pages shared, the tail's own.

        Returns it with the page that its last page must be copied from (`None` when the tail is
        empty). That source is shared too, so that nobody writes to it before the copy:
        `unpin` it afterwards. Raises OutOfPages having changed nothing.
        """
        full, tail = divmod(num_tokens, self.page_size)
        taken = self._take(1 if tail else 0, lease.budget)
        self.allocator.share(lease.pages[: full + len(taken)])
        twin = self._lease([*lease.pages[:full], *taken], 0, lease.retention, lease.budget)
        twin.num_published = min(lease.num_published, full)
        twin.num_proven = min(lease.num_proven, full)
        twin.is_private = lease.is_private
        return twin, lease.pages[full] if tail else None

    def unpin(self, page_id: PageId) -> None:
        """The copy from this page is done, or will never be made."""
        self.allocator.release((page_id,))

    def release(self, lease: PageLease) -> None:
        """Give the pages back, tail first, so that a parent is never evicted before its child."""
        if not lease.is_live:
            raise LawBroken(f"lease released twice: {lease!r}")
        lease.is_live = False
        del self.leases[id(lease)]
        if lease.retention.ttl_s is not None:
            self._ask(lease.pages[: lease.num_published], lease.retention)
        self.allocator.release(lease.pages[::-1])

    def promise_pin(
        self,
        name: str,
        tenant: str,
        tenant_pages: int | None,
        chain: PrefixChain,
        ttl_s: float | None,
    ) -> None:
        """Count the chain's pages as pinned, by `name`. Raises PinsFull having changed nothing."""
        self.pins.promise(name, tenant, tenant_pages, chain, len(chain.links), ttl_s)

    def keep_pin(self, name: str, lease: PageLease, chain: PrefixChain) -> None:
        """The promised pages are computed and proven: they are not evicted from now on.

        A pin that met a flush ends here: nobody would find its pages.
        """
        if lease.is_private:
            self.drop_pin(name)
            return
        self.allocator.share(self.pins.keep(name, chain, lease.pages, self.retained.now_s))

    def drop_pin(self, name: str) -> None:
        """The pin ends, kept or not: its pages are cached like any others."""
        self.allocator.release(self.pins.drop(name))

    def flush(self) -> int:
        """Forget every page that can be found; returns how many.

        From now on nobody finds any. `MAX_EMPTIED` of them are given up at once, the others in the
        next steps; until then whoever comes shares nothing, as those who run already: pages in use
        stay with those who use them, who write on and are found by nobody. Pins end.
        """
        num_found = 0 if self.is_emptying else len(self.index)
        self.allocator.release(self.pins.disown())
        for lease in self.leases.values():
            lease.is_private = True
        self._cached.doomed = list(self.index)
        self._empty_some()
        return num_found

    @property
    def is_emptying(self) -> bool:
        """A flush has pages to give up in the next steps."""
        return bool(self._cached.doomed)

    def _empty_some(self) -> None:
        doomed = self._cached.doomed
        for page_id in doomed[-MAX_EMPTIED:]:
            if page_id in self.index:  # else it was evicted meanwhile
                self.evictions.add(self.index.entry(page_id).link.key, EvictionCause.FLUSH)
                if page_id in self._cached:
                    self.discard(page_id)
                else:
                    self._cached.withdraw(page_id)
        del doomed[-MAX_EMPTIED:]

    def hurry_stores(self) -> None:
        """All that waits to be copied down goes with the next step."""
        self._stores.hurry()

    def drop_stores(self) -> None:
        """Copy nothing down of what waits for it."""
        self._stores.drop()

    def distrust(self, lease: PageLease) -> None:
        """Its logits were no numbers: withdraw every page of it that nobody sampled well from."""
        for page_id in lease.pages[: lease.num_published]:
            if (
                page_id in self.index
                and self.index.entry(page_id).link.key in self._cached.unproven
            ):
                self._cached.withdraw(page_id)

    def discard(self, page_id: PageId) -> None:
        """Forget what this cached page holds."""
        self._cached.withdraw(page_id)
        self._free(page_id)

    def _free(self, page_id: PageId) -> None:
        """A cached page holds nothing any more."""
        self.allocator.discard(page_id)
        self.budgets.clear(page_id)

    def quarantine(self, page_id: PageId) -> None:
        """Take a leaked page (held, named by no lease) out of service with what it holds."""
        if page_id in self.index:
            self._cached.withdraw(page_id)
        self.allocator.quarantine(page_id)
        self.budgets.clear(page_id)

    def _lease(
        self,
        pages: list[PageId],
        num_matched: int,
        retention: Retention = AS_IT_IS,
        budget: Budget | None = None,
    ) -> PageLease:
        lease = PageLease(
            pages,
            num_cached_tokens=num_matched * self.page_size,
            num_published=num_matched,
            retention=retention,
            budget=budget,
            is_private=self.is_emptying,
        )
        self.leases[id(lease)] = lease
        return lease


def _elsewhere(levels: LowerLevels, chain: PrefixChain, num_matched: int) -> dict[int, str]:
    """Pages after the matched ones that a level has under other settings, and which level.

    They are of this chain's namespaces: nothing is told of others. O(pages that are there).
    """
    found: dict[int, str] = {}
    for root in levels.other_roots:
        for page, key in enumerate(islice(chain.keys_under(root), MAX_ELSEWHERE)):
            level = levels.holder(key)
            if level is None:
                break
            if page >= num_matched:
                found.setdefault(page, level)
    return found
