from __future__ import annotations

import pytest

from kvpaging.base.errors import LawBroken
from kvpaging.base.ids import PageId
from kvpaging.cache.audit import Audit
from kvpaging.cache.cache_manager import CacheManager


def test_release_twice_and_share_of_a_free_page_say_so() -> None:
    pages = CacheManager(4, 2).allocator
    taken = pages.take(2)
    pages.release(taken)
    with pytest.raises(LawBroken, match="released while free"):
        pages.release(taken[:1])
    with pytest.raises(LawBroken, match="shared while free"):
        pages.share(taken)


def test_the_scratch_page_is_never_handed_out() -> None:
    pages = CacheManager(4, 2).allocator
    assert sorted(pages.take(4)) == [1, 2, 3, 4]


def test_the_audit_finds_a_leak_and_quarantines_it() -> None:
    cache = CacheManager(8, 2)
    leaked = cache.allocator.take(2)
    audit = Audit(cache)
    assert not audit.check_idle_slice()
    assert len(audit.breaches) == 2
    assert cache.allocator.num_quarantined == 2
    assert [cache.allocator.state(p) for p in leaked] == ["quarantined"] * 2
    audit.check_counts()
    assert set(cache.allocator.take(6)).isdisjoint(leaked)


def test_the_audit_stops_on_a_lease_over_pages_that_are_not_held() -> None:
    cache = CacheManager(8, 2)
    lease = cache.reserve([], 4)
    cache.allocator.release(lease.pages[:1])
    with pytest.raises(LawBroken, match="names page"):
        Audit(cache).check_next_lease()


def test_the_audit_finds_a_child_without_its_parent() -> None:
    cache = CacheManager(8, 2)
    chain = cache.chain(b"")
    chain.extend([1, 2, 3, 4])
    lease = cache.reserve([], 4)
    cache.commit(lease, chain, 4)
    cache.prove(lease, chain)
    first = lease.pages[0]
    cache.release(lease)
    cache.policy.remove(first)
    cache.index.withdraw(first)
    cache.allocator._free.append(first)
    audit = Audit(cache)
    audit.check_idle_slice()
    assert ["could not be reached" in breach for breach in audit.breaches] == [True]
    audit.check_idle_slice()
    assert audit.num_breaches == 1, "it was forgotten"


def test_eviction_takes_the_oldest_tail_first() -> None:
    cache = CacheManager(6, 1)
    chains = []
    for tokens in ([1, 2, 3], [4, 5, 6]):
        chain = cache.chain(b"")
        chain.extend(tokens)
        lease = cache.reserve([], 3)
        cache.commit(lease, chain, 3)
        cache.prove(lease, chain)
        cache.release(lease)
        chains.append(chain)
    cache.allocator.take(2)
    assert [len(cache.match(chain, 99)) for chain in chains] == [1, 3]
    assert cache.evictions.num_evicted == 2


def test_twins_both_serve_their_prefix() -> None:
    cache = CacheManager(6, 1)
    chain = cache.chain(b"")
    chain.extend([1, 2])
    leases = [cache.reserve([], 2) for _ in range(2)]
    for lease in leases:
        cache.commit(lease, chain, 2)
        cache.prove(lease, chain)
    first, second = (list(lease.pages) for lease in leases)
    cache.release(leases[0])
    cache.allocator.take(4)  # two free ones, then the first twin's pages are evicted
    assert cache.match(chain, 99) == second
    assert first != second


def test_equal_keys_with_other_tokens_do_not_match() -> None:
    """A key is never trusted alone: a collision is a miss."""
    cache = CacheManager(4, 2)
    chain = cache.chain(b"")
    chain.extend([1, 2])
    lease = cache.reserve([], 2)
    cache.commit(lease, chain, 2)
    cache.prove(lease, chain)
    other = cache.chain(b"")
    other.extend([3, 4])
    assert cache.match(chain, 3) == lease.pages
    other.links[0] = other.links[0]._replace(key=chain.links[0].key)
    assert cache.match(other, 3) == []


def test_page_ids_are_returned_most_recent_first() -> None:
    pages = CacheManager(4, 2).allocator
    taken = pages.take(3)
    pages.release(taken)
    assert pages.take(1) == [PageId(taken[-1])]
