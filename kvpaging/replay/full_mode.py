"""Full mode: the scheduler that serves, in simulated time, with a time model in place of a device.

Requests arrive when the trace says; batches, chunks, preemptions and waiting follow from the same
`Scheduler` and `CacheManager`. Every step is gone through: none is skipped. Token ids are made up
so that two prompts are alike exactly as far as the trace says: in each page the last token is the
page's id, and the others are 0. A page that is not full has no identity, here as in the server.

Planning ahead holds two plans as the engine does: the next one is made when a step begins, before
that step's result is known, and the device takes it up when it is done with the one before.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from typing import NamedTuple

import msgspec

from kvpaging.base.config import SchedulerConfig
from kvpaging.base.errors import LawBroken
from kvpaging.base.ids import RequestId, SeqId
from kvpaging.cache.cache_manager import CacheManager
from kvpaging.cache.eviction.names import POLICIES
from kvpaging.cache.lower_levels import PagesLost
from kvpaging.replay.cache_mode import count_pages, hits_by_level, prompt_pages
from kvpaging.replay.levels import LevelSize, SimulatedLevels
from kvpaging.replay.outcome import Latencies, Outcome
from kvpaging.replay.trace import Trace, TraceRequest, split_pages
from kvpaging.scheduling.events import Arrival, Event
from kvpaging.scheduling.outputs import SequenceOutput
from kvpaging.scheduling.plan import Sample, StepPlan, StepResult
from kvpaging.scheduling.request import Request, SamplingParams
from kvpaging.scheduling.scheduler import Scheduler

VOCAB_SIZE = 2**32
FILLER = Sample(0)


class StepWork(NamedTuple):
    """What a step's time depends on."""

    num_new_tokens: int
    num_context_tokens: int
    """Read once for each sequence."""
    num_pairs: int
    """Of a new token and one that it sees."""
    num_sequences: int

    @classmethod
    def of(cls, plan: StepPlan) -> StepWork:
        """A plan's work."""
        num_new = num_context = num_pairs = 0
        for entry in plan.scheduled:
            num = entry.num_new_tokens
            num_new += num
            num_context += entry.start
            num_pairs += num * entry.start + num * (num + 1) // 2
        return cls(num_new, num_context, num_pairs, len(plan.scheduled))


class StepTimes(msgspec.Struct, frozen=True):
    """What a step takes, in seconds: a fixed part, and so much for each piece of its work.

    The defaults are a model of 8 billion parameters in bf16 with 128 KiB of KV a token on a device
    of 3 TB/s and 400 TFLOP/s.
    """

    fixed_s: float = 0.0055
    per_new_token_s: float = 4e-5
    per_context_token_s: float = 4.4e-8
    per_pair_s: float = 1.3e-9
    """Attention: a new token with one that it sees."""
    per_sequence_s: float = 0.0
    """Whatever is done once for each: bookkeeping, logits, sampling."""

    def of(self, plan: StepPlan) -> float:
        """The step's time; nothing where nothing is computed."""
        if not plan.scheduled:
            return 0.0
        return self.of_work(StepWork.of(plan))

    def of_work(self, work: StepWork) -> float:
        """The time of a step that does this."""
        return (
            self.fixed_s
            + work.num_new_tokens * self.per_new_token_s
            + work.num_context_tokens * self.per_context_token_s
            + work.num_pairs * self.per_pair_s
            + work.num_sequences * self.per_sequence_s
        )


class Limits(msgspec.Struct, frozen=True):
    """What the simulated server allows besides its pages."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int | None = None
    """Longer requests are rejected; `None`: none is too long."""
    async_scheduling: bool = False
    """The next step is planned before the result of the one before it is known."""


def page_tokens(pages: Sequence[int], num_tokens: int, page_size: int) -> list[int]:
    """Made-up tokens whose full pages have these ids."""
    tokens = [0] * num_tokens
    tokens[page_size - 1 :: page_size] = pages[: num_tokens // page_size]
    return tokens


class _Held(NamedTuple):
    """A plan that was submitted and is not yet applied."""

    plan: StepPlan
    result: StepResult
    end_s: float


class _TraceExecutor:
    """Samples what the trace says, from plans alone; a request's index is its seed."""

    def __init__(self, page_size: int, ids: Iterator[int]):
        self._page_size = page_size
        self._ids = ids
        self._rows: dict[SeqId, int] = {}
        self.outputs: dict[int, tuple[int, list[int]]] = {}
        """Of open requests: the first page that the output fills, and the ids from there on."""

    def run(self, plan: StepPlan) -> StepResult:
        for seq_id in plan.removed:
            del self._rows[seq_id]
        for added in plan.added:
            self._rows[added.seq_id] = added.sampling.seed
        samples: list[tuple[Sample, ...]] = []
        for entry in plan.scheduled:
            position = entry.start + entry.num_new_tokens
            if not entry.sample_for:
                samples.append(())
            elif (position + 1) % self._page_size:
                samples.append((FILLER,))
            else:
                samples.append((self._page(self._rows[entry.seq_id], position),))
        return StepResult(plan.step_id, tuple(samples))

    def _page(self, index: int, position: int) -> Sample:
        first, ids = self.outputs.get(index, (0, ()))
        place = position // self._page_size - first
        return Sample(ids[place] if place < len(ids) else next(self._ids))


class Simulation:
    """One trace through one scheduler."""

    def __init__(
        self,
        trace: Trace,
        policy: str,
        capacity_pages: int | None,
        page_size: int | None = None,
        *,
        limits: Limits | None = None,
        times: StepTimes | None = None,
        sizes: Sequence[LevelSize] = (),
    ):
        limits = limits or Limits()
        self._trace = trace
        self._size = page_size or trace.block_size
        self._times = times or StepTimes()
        num_unique, num_pages, longest, self._first_free_id = _measure(trace, self._size)
        self._capacity = capacity_pages or num_unique + num_pages
        self._levels = SimulatedLevels(sizes, self._size) if sizes else None
        self.cache = CacheManager(
            self._capacity,
            self._size,
            policy=partial(POLICIES[policy], self._capacity),
            levels=self._levels,
        )
        self._policy = policy
        self.scheduler = Scheduler(
            SchedulerConfig(
                num_pages=self._capacity,
                page_size=self._size,
                max_num_seqs=limits.max_num_seqs,
                max_num_batched_tokens=max(limits.max_num_batched_tokens, limits.max_num_seqs),
                max_model_len=limits.max_model_len or longest,
                max_num_waiting=2**31,
            ),
            self.cache,
            vocab_size=VOCAB_SIZE,
        )
        self._is_unlimited = capacity_pages is None
        self._executor = _TraceExecutor(self._size, count(self._first_free_id))
        self._held: deque[_Held] = deque()
        self._lost: list[PagesLost] = []
        """What the levels are found to have lost, for the next plan."""
        self._max_held = 2 if limits.async_scheduling else 1
        self._device_free_s = 0.0
        self._arrivals: dict[RequestId, float] = {}
        self._ttfts_s: list[float] = []
        self._cached: dict[RequestId, int] = {}
        self._num_rejected = 0

    def run(self) -> Outcome:
        """Go through the whole trace. Raises ConfigError if it can't be read."""
        started = time.perf_counter()
        executor = self._executor
        now_s = 0.0
        requests = enumerate(self._trace)
        upcoming = next(requests, None)
        num_requests = num_tokens = num_pages = num_outputs = 0
        hit_tokens = hit_pages = 0
        while upcoming is not None or self._has_work:
            if upcoming is not None and not self._has_work:
                now_s = max(now_s, upcoming[1].arrival_s)
            events: list[Event] = [*self._levels.completions(now_s)] if self._levels else []
            events += self._lost
            self._lost = []
            while upcoming is not None and upcoming[1].arrival_s <= now_s:
                index, request = upcoming
                events.append(self._arrive(index, request, executor))
                num_requests += 1
                num_tokens += request.num_prompt_tokens
                num_pages += len(prompt_pages(request, self._trace.block_size, self._size))
                upcoming = next(requests, None)
            self._plan_ahead(events, now_s)
            next_end_s = None if self._levels is None else self._levels.next_end_s
            computes = any(held.plan.scheduled for held in self._held)
            if not computes and next_end_s is None and self.scheduler.num_waiting and not events:
                raise LawBroken("requests wait, nothing is in flight, and the plan is empty")
            plan, result, end_s = self._held.popleft()
            now_s = max(now_s, end_s)
            if not computes and next_end_s is not None:
                arrival_s = next_end_s if upcoming is None else upcoming[1].arrival_s
                now_s = max(now_s, min(next_end_s, arrival_s))
            outputs = self.scheduler.apply(plan, result, now_s)
            for rejection in outputs.rejections:
                self._num_rejected += 1
                del self._arrivals[rejection.request_id]
            for output in outputs.outputs:
                num_outputs += len(output.samples)
                cached = self._first_token(output, now_s)
                hit_tokens += cached
                hit_pages += cached // self._size
                if output.finished is not None:
                    executor.outputs.pop(int(output.request_id), None)
                    self._arrivals.pop(output.request_id, None)
        return Outcome(
            policy=self._policy,
            capacity_pages=None if self._is_unlimited else self._capacity,
            page_size=self._size,
            mode="full",
            num_requests=num_requests,
            num_pages=num_pages,
            num_hit_pages=hit_pages,
            num_tokens=num_tokens,
            num_hit_tokens=hit_tokens,
            num_evicted_pages=self.cache.evictions.num_evicted,
            seconds=time.perf_counter() - started,
            num_rejected=self._num_rejected,
            num_preemptions=self.scheduler.counters.preemptions,
            num_recomputed_tokens=self.scheduler.counters.recomputed_tokens,
            num_output_tokens=num_outputs,
            num_level_hit_pages=hits_by_level(self._levels),
            latencies=Latencies(quantile(self._ttfts_s, 0.5), quantile(self._ttfts_s, 0.99), now_s),
        )

    @property
    def _has_work(self) -> bool:
        """Another step would do something."""
        return self.scheduler.has_work or bool(self._held)

    def _plan_ahead(self, events: Sequence[Event], now_s: float) -> None:
        """Make and submit plans as `Engine` does: as many as may be held."""
        while len(self._held) < self._max_held and (
            events or self.scheduler.has_work or not self._held
        ):
            plan = self.scheduler.schedule(events, now_s)
            self._move(plan, now_s)
            elapsed_s = self._times.of(plan)
            result = msgspec.structs.replace(self._executor.run(plan), elapsed_s=elapsed_s)
            self._device_free_s = max(now_s, self._device_free_s) + elapsed_s
            self._held.append(_Held(plan, result, self._device_free_s))
            events = ()

    def _move(self, plan: StepPlan, now_s: float) -> None:
        """Carry out what a plan moves."""
        if self._levels is not None:
            self._levels.store(plan.stores)
            self._lost += self._levels.touch(plan.touches)
            for load in plan.loads:
                self._levels.begin(load, now_s)

    def _arrive(self, index: int, request: TraceRequest, executor: _TraceExecutor) -> Arrival:
        request_id = RequestId(str(index))
        self._arrivals[request_id] = request.arrival_s
        pages = prompt_pages(request, self._trace.block_size, self._size)
        if request.output_blocks:
            blocks = [*request.blocks, *request.output_blocks]
            num_tokens = request.num_prompt_tokens + request.num_output_tokens
            first = request.num_prompt_tokens // self._size
            every = split_pages(blocks, self._trace.block_size, self._size, num_tokens)
            executor.outputs[index] = (first, every[first:])
        sampling = SamplingParams(max_new_tokens=max(1, request.num_output_tokens), seed=index)
        tokens = page_tokens(pages, request.num_prompt_tokens, self._size)
        return Arrival(Request(request_id, tuple(tokens), sampling))

    def _first_token(self, output: SequenceOutput, now_s: float) -> int:
        """Note a request's first token; returns the tokens that were cached for it."""
        arrival_s = self._arrivals.get(output.request_id)
        if arrival_s is None or output.request_id in self._cached:
            return 0
        self._cached[output.request_id] = output.num_cached_tokens
        self._ttfts_s.append(now_s - arrival_s)
        return output.num_cached_tokens


def _measure(trace: Trace, page_size: int) -> tuple[int, int, int, int]:
    """(unique pages, pages of all outputs, tokens of the longest request, first unused id)."""
    num_unique, _ = count_pages(trace, page_size)
    num_output_pages = longest = first_free = 0
    for request in trace:
        num_tokens = request.num_prompt_tokens + max(1, request.num_output_tokens)
        num_output_pages += request.num_output_tokens // page_size + 2
        longest = max(longest, num_tokens)
        pages = prompt_pages(request, trace.block_size, page_size)
        first_free = max(first_free, max(pages, default=0) + 1)
    return num_unique, num_output_pages, longest, first_free


def quantile(values: Sequence[float], share: float) -> float:
    """Between the two values nearest to it in order, as `numpy.quantile` has it; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
