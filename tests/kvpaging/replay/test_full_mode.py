"""Full mode: time passes, requests wait, share, are preempted, and all of them are answered."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import IO

import msgspec
import pytest

from kvpaging.cache.eviction.names import POLICIES
from kvpaging.replay.cache_mode import replay_cache
from kvpaging.replay.full_mode import Limits, Simulation, StepTimes, page_tokens
from kvpaging.replay.outcome import Outcome
from kvpaging.replay.trace import Trace, TraceRequest, read_mooncake


def first(trace: Trace, count: int) -> Trace:
    def read(file: IO[bytes]) -> Iterator[TraceRequest]:
        for request in itertools.islice(read_mooncake(file), count):
            yield dataclasses.replace(request, num_output_tokens=request.num_output_tokens % 40)

    return dataclasses.replace(trace, read=read)


def one_after_the_other(trace: Trace) -> Trace:
    def read(file: IO[bytes]) -> Iterator[TraceRequest]:
        for number, request in enumerate(trace.read(file)):
            yield dataclasses.replace(request, arrival_s=number * 1000.0)

    return dataclasses.replace(trace, read=read)


def test_page_tokens_name_full_pages_only() -> None:
    assert page_tokens([5, 6, 7], 5, 2) == [0, 5, 0, 6, 0]
    assert page_tokens([5, 6], 4, 2) == [0, 5, 0, 6]
    assert page_tokens([5], 1, 2) == [0]
    assert page_tokens([5, 6], 2, 1) == [5, 6]


@pytest.mark.parametrize("policy", POLICIES)
def test_all_is_answered_and_time_passes(small: Trace, policy: str) -> None:
    trace = first(small, 80)
    outcome = Simulation(trace, policy, 600, limits=Limits(8, 2048)).run()
    requests = list(trace)
    assert outcome.num_requests == len(requests)
    assert outcome.num_rejected == 0
    assert outcome.num_output_tokens == sum(max(1, r.num_output_tokens) for r in requests)
    assert 0 < outcome.hit_ratio_tokens < 1
    assert outcome.latencies is not None
    assert outcome.latencies.simulated_s > requests[-1].arrival_s
    assert 0 < outcome.latencies.ttft_p50_s <= outcome.latencies.ttft_p99_s


def test_far_apart_requests_hit_as_in_cache_mode(small: Trace) -> None:
    """Alone, a request finds what cache mode finds, but for its last token and partial pages."""
    trace = one_after_the_other(first(small, 60))
    full = Simulation(trace, "lru", None).run()
    alone = replay_cache(trace, "lru", None)
    assert full.num_preemptions == 0
    assert full.num_hit_pages <= alone.num_hit_pages
    # A block that is partial in the trace is no page in the server: at most one a request.
    assert full.num_hit_pages >= alone.num_hit_pages - full.num_requests
    assert full.num_hit_pages > 0


def test_a_smaller_page_finds_more(small: Trace) -> None:
    trace = one_after_the_other(first(small, 30))
    coarse, fine = (Simulation(trace, "lru", None, size).run() for size in (512, 64))
    assert fine.num_hit_tokens >= coarse.num_hit_tokens > 0


def squeezed(trace: Trace) -> Outcome:
    """Long outputs, all asked for at once, in pages for a few of them."""

    def read(file: IO[bytes]) -> Iterator[TraceRequest]:
        for request in itertools.islice(read_mooncake(file), 40):
            yield dataclasses.replace(request, arrival_s=0.0, num_output_tokens=200)

    limits = Limits(max_num_seqs=16, max_num_batched_tokens=4096)
    outcome = Simulation(dataclasses.replace(trace, read=read), "lru", 600, 16, limits=limits).run()
    return msgspec.structs.replace(outcome, seconds=0.0)


def test_too_few_pages_reject_what_never_fits_and_preempt_the_rest(small: Trace) -> None:
    outcome = squeezed(small)
    assert outcome.num_rejected > 0
    assert outcome.num_preemptions > 0
    assert outcome.num_output_tokens == (40 - outcome.num_rejected) * 200
    assert outcome == squeezed(small), "the same run differs"


def test_a_slower_device_makes_everyone_wait_longer(small: Trace) -> None:
    trace = first(small, 40)
    fast, slow = (
        Simulation(trace, "lru", 2000, times=StepTimes(per_new_token_s=s)).run().latencies
        for s in (1e-5, 1e-4)
    )
    assert fast is not None
    assert slow is not None
    assert slow.ttft_p50_s > 2 * fast.ttft_p50_s
