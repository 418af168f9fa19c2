"""Break the cache on purpose: the state machine must see each of these faults."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cache_machine import CacheMachine
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule, run_state_machine_as_test

from kvpaging.base.errors import LawBroken
from kvpaging.base.ids import PageId, PageKey
from kvpaging.cache import prefix_key
from kvpaging.cache.cache_manager import CacheManager, _CachedPages
from kvpaging.cache.eviction.arc import AdaptiveReplacement
from kvpaging.cache.page_lease import PageLease
from kvpaging.cache.prefix_index import PrefixIndex
from kvpaging.cache.prefix_key import ChainLink, PrefixChain

Patch = Callable[[pytest.MonkeyPatch], None]


class Alike(CacheMachine):
    """Everybody sends the beginning of the same prompt, a token a page: twins are common."""

    @initialize(page_size=st.just(1), num_pages=st.integers(6, 8), max_pinned=st.just(0))
    def start(self, page_size: int, num_pages: int, max_pinned: int) -> None:
        CacheMachine.start(self, page_size, num_pages, max_pinned)

    @rule(
        namespace=st.just(b""),
        tokens=st.lists(st.just(1), min_size=1, max_size=12),
        chunk=st.integers(1, 12),
        num_shared=st.just(0),
    )
    def arrive(self, namespace: bytes, tokens: list[int], chunk: int, num_shared: int) -> None:
        CacheMachine.arrive(self, namespace, tokens, chunk, num_shared)


def drop_the_namespace(patch: pytest.MonkeyPatch) -> None:
    real = prefix_key.page_key
    patch.setattr(prefix_key, "page_key", lambda parent, _, tokens: real(parent, b"", tokens))


def share_what_comes_after_the_shared_beginning(patch: pytest.MonkeyPatch) -> None:
    def namespace_of(self: PrefixChain, end: int) -> bytes:
        shared = self._shared
        is_shared = shared is not None and end < shared.num_tokens + self.page_size
        return shared.namespace if shared is not None and is_shared else self._namespace

    patch.setattr(PrefixChain, "_namespace_of", namespace_of)


def drop_the_parent(patch: pytest.MonkeyPatch) -> None:
    real = prefix_key.page_key
    nobody = PageKey(b"")
    patch.setattr(prefix_key, "page_key", lambda _, space, tokens: real(nobody, space, tokens))


def match_the_last_token_too(patch: pytest.MonkeyPatch) -> None:
    def match(self: CacheManager, chain: PrefixChain, num_tokens: int) -> list[PageId]:
        return self.index.match(chain, num_tokens // self.page_size)

    patch.setattr(CacheManager, "match", match)


def publish_a_page_that_is_not_full(patch: pytest.MonkeyPatch) -> None:
    real = CacheManager.commit

    def commit(self: CacheManager, lease: PageLease, chain: PrefixChain, num_computed: int) -> None:
        real(self, lease, chain, min(num_computed + 1, len(chain.links) * self.page_size))

    patch.setattr(CacheManager, "commit", commit)


def share_the_tail_page_at_a_fork(patch: pytest.MonkeyPatch) -> None:
    def fork(
        self: CacheManager, lease: PageLease, num_tokens: int
    ) -> tuple[PageLease, PageId | None]:
        pages = lease.pages[: self.pages_for(num_tokens)]
        self.allocator.share(pages)
        twin = self._lease(pages, 0)
        twin.num_published = min(lease.num_published, num_tokens // self.page_size)
        return twin, None

    patch.setattr(CacheManager, "fork", fork)


def keep_a_page_at_release(patch: pytest.MonkeyPatch) -> None:
    real = CacheManager.release

    def release(self: CacheManager, lease: PageLease) -> None:
        self.allocator.share(lease.pages[:1])
        real(self, lease)

    patch.setattr(CacheManager, "release", release)


def forget_to_withdraw_at_eviction(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_CachedPages, "evict", lambda self: self._policy.victim())


def release_head_first(patch: pytest.MonkeyPatch) -> None:
    def release(self: CacheManager, lease: PageLease) -> None:
        if not lease.is_live:
            raise LawBroken("released twice")
        lease.is_live = False
        del self.leases[id(lease)]
        self.allocator.release(lease.pages)

    patch.setattr(CacheManager, "release", release)


def one_page_a_key(patch: pytest.MonkeyPatch) -> None:
    real = PrefixIndex.publish

    def publish(self: PrefixIndex, page_id: PageId, parent: PageKey, link: ChainLink) -> None:
        if not self.has_key(link.key):
            real(self, page_id, parent, link)

    patch.setattr(PrefixIndex, "publish", publish)


def forget_who_has_children(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CacheMachine, "policy", "fifo")
    patch.setattr(PrefixIndex, "has_children", lambda self, key: False)


def forget_that_a_parent_became_a_leaf(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CacheMachine, "policy", "arc")
    patch.setattr(AdaptiveReplacement, "expose", lambda self, page_id: None)


def keep_a_twin_of_what_is_in_use(patch: pytest.MonkeyPatch) -> None:
    def keep(self: _CachedPages, page_id: PageId) -> bool:
        if page_id not in self._index:
            return False
        key = self._index.entry(page_id).link.key
        self._policy.add(page_id, key, is_leaf=not self._index.has_children(key))
        return True

    patch.setattr(_CachedPages, "keep", keep)


MUTANTS: list[Patch] = [
    forget_who_has_children,
    forget_that_a_parent_became_a_leaf,
    keep_a_twin_of_what_is_in_use,
    drop_the_namespace,
    share_what_comes_after_the_shared_beginning,
    drop_the_parent,
    match_the_last_token_too,
    publish_a_page_that_is_not_full,
    share_the_tail_page_at_a_fork,
    keep_a_page_at_release,
    forget_to_withdraw_at_eviction,
    release_head_first,
    one_page_a_key,
]
MACHINES: dict[Patch, type[CacheMachine]] = {one_page_a_key: Alike}
"""Where another finds it in a fraction of the time."""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_machine_sees(mutant: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    search = settings(
        max_examples=30_000,  # the shyest shows once in some 500
        stateful_step_count=30,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever form the fault takes
        run_state_machine_as_test(MACHINES.get(mutant, CacheMachine), settings=search)
