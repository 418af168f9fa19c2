"""Cache mode: each request is looked up and inserted at once, one after the other.

No time, no batch, no preemption: what remains is the cache itself, through the same `CacheManager`
that serves, in its order of leaves. `replay_blocks` runs the same policies over single blocks
without that order, as web caches do, for comparison: there, a block may be kept whose prefix is
gone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import partial

from kvpaging.base.ids import PageId, PageKey
from kvpaging.cache.cache_manager import CacheManager
from kvpaging.cache.eviction.names import POLICIES
from kvpaging.cache.prefix_key import ChainLink, PrefixChain
from kvpaging.replay.levels import LevelSize, SimulatedLevels
from kvpaging.replay.outcome import Outcome
from kvpaging.replay.trace import Trace, TraceRequest, split_pages


def count_pages(trace: Trace, page_size: int) -> tuple[int, int]:
    """(unique pages, pages of the longest request) of a trace."""
    unique: set[int] = set()
    longest = 0
    for request in trace:
        pages = all_pages(request, trace.block_size, page_size)
        unique.update(pages)
        longest = max(longest, len(pages))
    return len(unique), longest


def prompt_pages(request: TraceRequest, block_size: int, page_size: int) -> list[int]:
    """Ids of the prompt's pages."""
    return split_pages(request.blocks, block_size, page_size, request.num_prompt_tokens)


def all_pages(request: TraceRequest, block_size: int, page_size: int) -> list[int]:
    """Ids of the prompt's pages and of those that the output filled, where they are known."""
    if not request.output_blocks:
        return prompt_pages(request, block_size, page_size)
    num_tokens = request.num_prompt_tokens + request.num_output_tokens
    blocks = [*request.blocks, *request.output_blocks]
    return split_pages(blocks, block_size, page_size, num_tokens)


def replay_cache(
    trace: Trace,
    policy: str,
    capacity_pages: int | None,
    page_size: int | None = None,
    *,
    sizes: Sequence[LevelSize] = (),
) -> Outcome:
    """Run the trace through a `CacheManager` of so many pages (`None`: as many as it can fill).

    `sizes` are those of levels below it.

    Raises ConfigError if the trace can't be read. A request longer than the cache is cut to it.
    """
    started = time.perf_counter()
    size = page_size or trace.block_size
    num_pages = capacity_pages or sum(count_pages(trace, size))
    levels = SimulatedLevels(sizes, size) if sizes else None
    cache = CacheManager(
        num_pages, size, policy=partial(POLICIES[policy], num_pages), levels=levels
    )
    num_requests = queried = hits = tokens = hit_tokens = 0
    for request in trace:
        prompt = prompt_pages(request, trace.block_size, size)
        links = [_link(page) for page in all_pages(request, trace.block_size, size)[:num_pages]]
        chain = PrefixChain.of_links(cache.root, links, size)
        # One token more than the prompt's pages hold: a match leaves the last token to compute.
        num_findable = min(len(prompt), len(links))
        matched = cache.match(chain, num_findable * size + 1)
        num_tokens = len(links) * size
        num_found = len(matched)
        if levels is not None:
            loads = levels.load(links[len(matched) : num_findable])
            num_found += sum(load.num_loaded for load in loads)
        lease = cache.reserve(matched, num_tokens)
        cache.touch(chain, matched)
        cache.commit_loaded(lease, chain, num_found - len(matched))
        cache.commit(lease, chain, num_tokens)
        cache.prove(lease, chain)
        cache.release(lease)
        if levels is not None:
            for lost in levels.touch(cache.take_touches()):
                cache.store_again(lost)
            levels.store(cache.take_stores())
        num_requests += 1
        queried += len(prompt)
        hits += num_found
        tokens += request.num_prompt_tokens
        hit_tokens += min(num_found * size, request.num_prompt_tokens)
    return Outcome(
        policy=policy,
        capacity_pages=capacity_pages,
        page_size=size,
        mode="cache",
        num_requests=num_requests,
        num_pages=queried,
        num_hit_pages=hits,
        num_tokens=tokens,
        num_hit_tokens=hit_tokens,
        num_evicted_pages=cache.evictions.num_evicted,
        seconds=time.perf_counter() - started,
        num_level_hit_pages=hits_by_level(levels),
    )


def hits_by_level(levels: SimulatedLevels | None) -> dict[str, int]:
    """Pages that each level below the device had; empty without any."""
    return {} if levels is None else {name: levels.num_hits[name] for name in levels.names}


def _link(page: int) -> ChainLink:
    # An id of the trace names the whole prefix already, as a key does.
    return ChainLink(PageKey(page.to_bytes(8, "little")), b"")


class BlockCache:
    """A policy over single blocks: every block is a leaf, and none is in use."""

    def __init__(self, policy: str, capacity: int):
        self._policy = POLICIES[policy](capacity)
        self._capacity = capacity
        self.num_evicted = 0

    def get(self, block: int) -> bool:
        """Look one block up, and put it in if it is missing; returns whether it was there."""
        page_id, key = PageId(block), PageKey(block.to_bytes(8, "little"))
        found = page_id in self._policy
        if found:
            self._policy.remove(page_id)
        elif len(self._policy) >= self._capacity:
            self._policy.victim()
            self.num_evicted += 1
        self._policy.add(page_id, key, is_leaf=True)
        return found


def replay_blocks(
    trace: Trace, policy: str, capacity_pages: int | None, page_size: int | None = None
) -> Outcome:
    """The same trace block by block, without leaf order. Hits count while there is no gap."""
    started = time.perf_counter()
    size = page_size or trace.block_size
    cache = BlockCache(policy, capacity_pages or count_pages(trace, size)[0])
    num_requests = queried = hits = tokens = hit_tokens = 0
    for request in trace:
        pages = prompt_pages(request, trace.block_size, size)
        num_matched = _num_before_gap(cache.get(page) for page in pages)
        num_requests += 1
        queried += len(pages)
        hits += num_matched
        tokens += request.num_prompt_tokens
        hit_tokens += min(num_matched * size, request.num_prompt_tokens)
    return Outcome(
        policy=policy,
        capacity_pages=capacity_pages,
        page_size=size,
        mode="blocks",
        num_requests=num_requests,
        num_pages=queried,
        num_hit_pages=hits,
        num_tokens=tokens,
        num_hit_tokens=hit_tokens,
        num_evicted_pages=cache.num_evicted,
        seconds=time.perf_counter() - started,
    )


def _num_before_gap(found: Iterable[bool]) -> int:
    """How many come before the first miss; goes through all of them."""
    count, is_whole = 0, True
    for one in found:
        is_whole = is_whole and one
        count += is_whole
    return count
