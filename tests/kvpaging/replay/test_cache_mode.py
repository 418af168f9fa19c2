"""The cache on traces: known ratios, another implementation's ratios, and a plain model of LRU."""

from __future__ import annotations

import time
from collections import OrderedDict
from pathlib import Path

import pytest

from kvpaging.cache.eviction.names import POLICIES
from kvpaging.replay.cache_mode import BlockCache, count_pages, replay_blocks, replay_cache
from kvpaging.replay.trace import Trace, split_pages

KNOWN = {
    1000: 0.0445,
    5859: 0.1361,
    10_000: 0.2116,
    30_000: 0.3257,
    50_000: 0.3546,
    100_000: 0.3637,
    None: 0.3664,
}


def leaf_lru(trace: Trace, capacity: int) -> tuple[int, int]:
    """(hits, pages): the same in a few lines, without pages, leases or an index."""
    cached: OrderedDict[int, None] = OrderedDict()
    hits = queried = 0
    for request in trace:
        blocks = list(request.blocks)[:capacity]
        matched = next((i for i, b in enumerate(blocks) if b not in cached), len(blocks))
        for block in blocks[:matched]:
            del cached[block]
        while len(cached) + len(blocks) > capacity:
            cached.popitem(last=False)
        for block in reversed(blocks):
            cached[block] = None
        hits += matched
        queried += len(request.blocks)
    return hits, queried


@pytest.mark.parametrize("capacity", [30, 300, 1000])
def test_leaf_lru_is_what_it_says(small: Trace, capacity: int) -> None:
    outcome = replay_cache(small, "lru", capacity)
    assert (outcome.num_hit_pages, outcome.num_pages) == leaf_lru(small, capacity)
    assert outcome.num_evicted_pages > 0


def test_more_never_hurts_lru_and_unlimited_is_the_limit(small: Trace) -> None:
    ratios = [replay_cache(small, "lru", c).hit_ratio_pages for c in (10, 100, 1000, 3000, None)]
    assert ratios == sorted(ratios)
    assert 0 < ratios[0] < ratios[-1]
    unlimited = {replay_cache(small, p, None).num_hit_pages for p in POLICIES}
    assert len(unlimited) == 1
    assert replay_cache(small, "lru", None).num_evicted_pages == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_keeps_to_its_capacity_and_differs_from_none(
    small: Trace, policy: str
) -> None:
    outcome = replay_cache(small, policy, 300)
    assert 0 < outcome.num_hit_pages <= replay_cache(small, policy, None).num_hit_pages
    assert outcome.num_hit_tokens <= outcome.num_tokens
    blocks = replay_blocks(small, policy, 300)
    assert 0 < blocks.num_hit_pages <= replay_blocks(small, policy, None).num_hit_pages


def test_a_request_longer_than_the_cache_is_cut_to_it(small: Trace) -> None:
    _, longest = count_pages(small, small.block_size)
    outcome = replay_cache(small, "lru", longest // 3)
    assert (outcome.num_hit_pages, outcome.num_pages) == leaf_lru(small, longest // 3)


@pytest.mark.parametrize("page_size", [128, 512, 1024, 4096])
def test_page_sizes_around_the_block(small: Trace, page_size: int) -> None:
    by_block = replay_cache(small, "lru", None)
    outcome = replay_cache(small, "lru", None, page_size)
    assert outcome.page_size == page_size
    if page_size <= 512:
        # What is alike, is alike down to the parts of the last block.
        assert outcome.num_hit_tokens == by_block.num_hit_tokens
    else:
        assert 0 < outcome.num_hit_tokens < by_block.num_hit_tokens


def test_pages_are_alike_exactly_as_far_as_their_blocks() -> None:
    assert split_pages([7, 8], 4, 4, 6) == [7, 8]
    assert split_pages([7, 8], 4, 2, 6) == [14, 15, 16]
    assert split_pages([7, 8, 9], 4, 8, 10) == [8, 9]
    assert split_pages([7], 4, 4, 6) == [7], "a partial block that the trace does not name"
    assert split_pages([7], 4, 2, 6) == [14, 15]


@pytest.mark.slow
@pytest.mark.parametrize("capacity", KNOWN)
def test_leaf_lru_on_mooncakes_conversations(mooncake: Trace, capacity: int | None) -> None:
    cpu_s = time.process_time()
    outcome = replay_cache(mooncake, "lru", capacity)
    cpu_s = time.process_time() - cpu_s
    assert outcome.num_requests == 12_031
    assert outcome.num_pages == 288_500
    assert outcome.hit_ratio_pages == pytest.approx(KNOWN[capacity], abs=0.002)
    assert cpu_s <= 5


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lru", "fifo", "lfu", "arc"])
def test_blocks_agree_with_libcachesim(mooncake: Trace, policy: str) -> None:
    compare_with_libcachesim(mooncake, policy, 10_000)


@pytest.mark.parametrize("capacity", [50, 500, 2000])
@pytest.mark.parametrize("policy", ["lru", "fifo", "lfu", "arc"])
def test_blocks_agree_with_libcachesim_on_a_small_trace(
    small: Trace, policy: str, capacity: int
) -> None:
    compare_with_libcachesim(small, policy, capacity)


def compare_with_libcachesim(trace: Trace, policy: str, capacity: int) -> None:
    libcachesim = pytest.importorskip("libcachesim", reason="pip install libcachesim")
    theirs = getattr(libcachesim, policy.upper())(capacity)
    ours = BlockCache(policy, capacity)
    wanted = libcachesim.Request()
    wanted.obj_size = 1
    num_blocks = num_theirs = num_ours = 0
    for request in trace:
        for block in request.blocks:
            wanted.obj_id = block
            num_blocks += 1
            num_theirs += theirs.get(wanted)
            num_ours += ours.get(block)
    assert num_theirs > 0
    assert num_ours / num_blocks == pytest.approx(num_theirs / num_blocks, abs=0.001)


@pytest.mark.slow
def test_leaf_order_counts_for_more_than_the_policy(mooncake: Trace) -> None:
    """Over single blocks, random choice loses most of its hits."""
    leaves = replay_cache(mooncake, "random", 10_000).hit_ratio_pages
    blocks = replay_blocks(mooncake, "random", 10_000).hit_ratio_pages
    assert blocks < 0.5 * leaves


@pytest.mark.slow
def test_azures_code_trace_has_nothing_alike(azure: Trace) -> None:
    outcome = replay_cache(azure, "lru", 2000, 512)
    assert outcome.num_requests == 8819
    assert outcome.num_hit_pages == 0


def test_the_same_trace_is_read_again(small: Trace, small_path: Path) -> None:
    assert small.path == small_path
    assert list(small) == list(small)
