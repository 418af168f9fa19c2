"""Full mode: time passes, requests wait, share, are preempted, and all of them are answered."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import msgspec
import pytest
from digest_model import DigestExecutor, digest_config

from kvpaging.base.ids import StepId
from kvpaging.cache.eviction.names import POLICIES
from kvpaging.engine.engine import Engine
from kvpaging.replay.cache_mode import replay_cache
from kvpaging.replay.full_mode import VOCAB_SIZE, Limits, Simulation, StepTimes, page_tokens
from kvpaging.replay.outcome import Outcome
from kvpaging.replay.trace import Trace, TraceRequest, read_mooncake
from kvpaging.scheduling.events import Event
from kvpaging.scheduling.outputs import StepOutputs
from kvpaging.scheduling.plan import StepPlan, StepResult
from kvpaging.scheduling.scheduler import Scheduler


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


class Call(NamedTuple):
    """Of `Scheduler.schedule` (with its events) or of `Scheduler.apply`."""

    name: str
    events: tuple[Event, ...]
    plan: StepPlan


class Watch:
    """Notes every call of a scheduler, and the results."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[Call] = []
        self.results: dict[StepId, StepResult] = {}
        watch, schedule, apply = self, Scheduler.schedule, Scheduler.apply

        def watched_schedule(self: Scheduler, events: Sequence[Event], now: float) -> StepPlan:
            plan = schedule(self, events, now)
            watch.calls.append(Call("schedule", tuple(events), plan))
            return plan

        def watched_apply(
            self: Scheduler, plan: StepPlan, result: StepResult, now: float
        ) -> StepOutputs:
            watch.calls.append(Call("apply", (), plan))
            watch.results[plan.step_id] = result
            return apply(self, plan, result, now)

        patch.setattr(Scheduler, "schedule", watched_schedule)
        patch.setattr(Scheduler, "apply", watched_apply)

    def take(self) -> list[Call]:
        taken, self.calls = self.calls, []
        return taken


class Repeating(DigestExecutor):
    """Gives the results that were given before."""

    def __init__(self, results: dict[StepId, StepResult]) -> None:
        super().__init__(1, 1)
        self._results = dict(results)

    def run(self, plan: StepPlan) -> StepResult:
        return self._results[plan.step_id]


def events_by_step(calls: list[Call]) -> Iterator[tuple[Event, ...]]:
    """What `Engine.step` would have been given: it ends with applying one plan."""
    given: tuple[Event, ...] | None = None
    for call in calls:
        if call.name == "apply":
            yield given or ()
            given = None
        elif given is None:
            given = call.events


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize("max_num_seqs", [2, 8])
def test_the_scheduler_is_called_as_the_engine_calls_it(
    monkeypatch: pytest.MonkeyPatch, small: Trace, max_num_seqs: int, ahead: bool
) -> None:
    watch = Watch(monkeypatch)
    trace = first(small, 60)
    limits = Limits(max_num_seqs, 2048, async_scheduling=ahead)
    simulation = Simulation(trace, "lru", 600, limits=limits)
    outcome = simulation.run()
    assert outcome.num_rejected == 0
    assert outcome.num_output_tokens == sum(max(1, r.num_output_tokens) for r in trace)
    simulated = watch.take()
    assert [call.name for call in simulated[:3]].count("schedule") == 2
    assert (simulated[1].name == "schedule") is ahead
    config = msgspec.structs.replace(
        digest_config(eos_token_ids=()),
        scheduler=simulation.scheduler.config,
        vocab_size=VOCAB_SIZE,
        async_scheduling=ahead,
    )
    engine = Engine(config, Repeating(watch.results), clock=lambda: 0.0)
    for events in events_by_step(simulated):
        engine.step(events)
    assert not engine.has_work
    assert watch.take() == simulated


@pytest.mark.parametrize(("ahead", "waits_s"), [(False, [1.0, 1.5]), (True, [1.0, 2.5])])
def test_who_comes_while_a_step_was_planned_ahead_waits_for_it(
    ahead: bool, waits_s: list[float]
) -> None:
    made = [TraceRequest(0.0, 4, 9, (1,)), TraceRequest(0.5, 4, 2, (2,))]
    trace = Trace(Path(os.devnull), 8, lambda _: iter(made))
    limits = Limits(4, 64, async_scheduling=ahead)
    simulation = Simulation(trace, "lru", 8, limits=limits, times=StepTimes(1.0, 0.0, 0.0, 0.0))
    outcome = simulation.run()
    assert simulation._ttfts_s == waits_s
    assert outcome.num_output_tokens == 11


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
