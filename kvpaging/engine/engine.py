"""The step loop: events in, one plan, one result, outputs out.

With `async_scheduling` two plans are held: the next one is made and submitted before the result of
the one before it is waited for, so the device never waits for the host. What an ended sequence
sampled in the plan that was made too early is dropped by `Scheduler.apply`.

The engine knows token ids only, never text, sockets or processes. The same engine runs in the
engine process, in tests, and as a library (`from kvpaging import Engine`).
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, Self

from kvpaging.base.clock import Clock, monotonic
from kvpaging.base.config import EngineConfig, EngineOptions
from kvpaging.base.errors import BadRequest, KvPagingError, LawBroken
from kvpaging.base.ids import PageId, RequestId, StepId
from kvpaging.cache.audit import Audit
from kvpaging.cache.cache_manager import CacheManager
from kvpaging.cache.eviction.names import POLICIES
from kvpaging.cache.pins import PinState
from kvpaging.engine.messages import CacheStats, EngineStats, PageState
from kvpaging.execution.executor import Executor, RunningStep
from kvpaging.replay.recording import Recorder, create_file
from kvpaging.scheduling.events import Abort, Arrival, Event
from kvpaging.scheduling.outputs import Finished, FinishReason, StepOutputs
from kvpaging.scheduling.plan import Sample, StepPlan
from kvpaging.scheduling.request import Request, SamplingParams
from kvpaging.scheduling.scheduler import Scheduler

LOAD_WAIT_S: Final = 0.005
"""A step with nothing to compute waits so long for moves: new requests wait no longer."""


@dataclass(slots=True)
class Completion:
    """One output of `Engine.generate`, complete."""

    request_id: RequestId
    output_index: int
    samples: list[Sample] = field(default_factory=list)
    prompt_samples: list[Sample] = field(default_factory=list)
    """Of output 0, where prompt log-probabilities were asked for: from the second token on."""
    num_cached_tokens: int = 0
    finished: Finished | None = None

    @property
    def token_ids(self) -> list[int]:
        """The sampled tokens."""
        return [sample.token_id for sample in self.samples]


class _Held(NamedTuple):
    """A plan that was submitted and is not yet applied."""

    plan: StepPlan
    running: RunningStep
    submitted_s: float


class Engine:
    """One model on one device: continuous batching over a paged KV cache.

    Not thread-safe: one thread owns the engine and its device.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        *,
        clock: Clock = monotonic,
        recorder: Recorder | None = None,
    ):
        self.config = config
        self._executor = executor
        started_s = clock()
        self._clock: Clock = lambda: clock() - started_s  # so that a rerun has the very same times
        self._recorder = recorder
        self._cache = CacheManager(
            config.scheduler.num_pages,
            config.scheduler.page_size,
            numerics_identity=config.numerics_identity,
            prefix_cache=config.scheduler.prefix_cache,
            policy=partial(POLICIES[config.scheduler.eviction_policy], config.scheduler.num_pages),
            levels=executor.lower_levels if recorder is None else recorder.levels,
            max_pinned_pages=config.scheduler.max_pinned_pages,
        )
        self._scheduler = Scheduler(
            config.scheduler,
            self._cache,
            vocab_size=config.vocab_size,
            eos_token_ids=frozenset(config.eos_token_ids),
        )
        self._audit = Audit(self._cache)
        self._held: deque[_Held] = deque()
        self._max_held = 2 if config.async_scheduling else 1
        self._step_id = 0
        self._step_s = 0.0
        self._ended_s = 0.0

    @classmethod
    def from_options(cls, options: EngineOptions) -> Self:
        """Load the model and make an engine. Raises ConfigError."""
        from kvpaging.execution.loading import load_executor

        config, executor = load_executor(options)
        return cls(config, executor, recorder=make_recorder(options, config, executor))

    @property
    def has_work(self) -> bool:
        """Another step would do something."""
        return self._scheduler.has_work or bool(self._held)

    @property
    def due_in_s(self) -> float | None:
        """In so many seconds a step has to end pins or pages whose time is over; 0: now.

        `None`: without new events never.
        """
        end_s = self._cache.next_end_s
        return None if end_s is None else max(0.0, end_s - self._clock())

    def step(self, events: Sequence[Event] = ()) -> StepOutputs:
        """Take the events in, and wait for one step.

        An exception from the executor, or a broken law, means that this engine is over: its state
        is not to be trusted.
        """
        self._plan_ahead([*self._executor.completions(), *events])
        plan, running, submitted_s = self._held.popleft()
        result = running.result()
        ended = self._clock()
        outputs = self._scheduler.apply(plan, result, ended)
        if self._recorder is not None:
            self._recorder.applied(result, outputs, self._cache.pins)
        self._audit.check_counts()
        self._audit.check_next_lease()
        self._step_id = plan.step_id
        self._step_s = ended - max(submitted_s, self._ended_s)
        self._ended_s = ended
        computes = plan.scheduled or any(held.plan.scheduled for held in self._held)
        if not computes and (self._scheduler.waits_for_levels or self._cache.has_stores):
            self._executor.wait(LOAD_WAIT_S)
        return outputs

    def _plan_ahead(self, events: Sequence[Event]) -> None:
        """Make and submit plans until as many are held as may be, or nothing is left to do.

        There is always room for one: the events are taken in before anything is waited for.
        """
        while len(self._held) < self._max_held and (
            events or self._scheduler.has_work or not self._held
        ):
            now = self._clock()
            plan = self._scheduler.schedule(events, now)
            num_held = len(self._held)
            self._held.append(_Held(plan, self._executor.submit(plan), now))
            if self._recorder is not None:
                self._recorder.planned(now, events, plan, num_held)
            events = ()

    def audit_idle(self) -> bool:
        """Check the laws on a slice of the pages while nothing runs; returns whether more is left.

        Leaked pages are quarantined and reported by `stats().broken_laws`.
        """
        return self._audit.check_idle_slice()

    def stats(self) -> EngineStats:
        """State now, and totals. O(running sequences)."""
        pages, scheduler, cache = self._cache.allocator, self._scheduler, self._cache
        return EngineStats(
            step_id=self._step_id,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_free_pages=pages.num_free,
            num_cached_pages=pages.num_cached,
            num_held_pages=pages.num_held,
            num_wasted_slots=scheduler.num_wasted_slots,
            num_evicted_pages=cache.evictions.num_evicted,
            num_preemptions=scheduler.counters.preemptions,
            num_recomputed_tokens=scheduler.counters.recomputed_tokens,
            prefix_queried_tokens=cache.counters.queried_tokens,
            prefix_hit_tokens=cache.counters.hit_tokens,
            num_computed_tokens=scheduler.counters.computed_tokens,
            num_loading=scheduler.num_loading,
            num_loaded_pages=scheduler.counters.loaded_pages,
            step_s=self._step_s,
            num_quarantined_pages=pages.num_quarantined,
            num_pinned_pages=cache.pins.num_owned,
            broken_laws=tuple(self._audit.breaches),
        )

    def cache_stats(self, query_id: int = 0) -> CacheStats:
        """What the cache did so far, level by level. O(levels)."""
        cache, pages, config = self._cache, self._cache.allocator, self.config
        counters = cache.counters
        return CacheStats(
            query_id=query_id,
            page_size=cache.page_size,
            page_bytes=config.kv_cache_bytes // pages.num_pages,
            pages={
                "free": pages.num_free,
                "cached": pages.num_cached,
                "held": pages.num_held,
                "quarantined": pages.num_quarantined,
            },
            queried_tokens=counters.queried_tokens,
            hit_tokens=counters.hit_tokens,
            queried_pages=counters.queried_pages,
            hit_pages=dict(counters.hit_pages),
            missed_pages=dict(counters.missed_pages),
            num_recomputed_tokens=self._scheduler.counters.recomputed_tokens,
            evictions={str(cause): count for cause, count in cache.evictions.counts.items()},
            saved_s=counters.saved_s,
            load_times=counters.load_times,
            choices=self._scheduler.load_choices,
            below=self._executor.below(),
        )

    def pages(self) -> tuple[PageState, ...]:
        """Every page as it is now. O(pages): for people, not for steps."""
        pages = self._cache.allocator
        size = self._cache.page_size
        num_tokens: dict[PageId, int] = {}
        for sequence in self._scheduler.running:
            if sequence.lease is not None:
                for i, page_id in enumerate(sequence.lease.pages):
                    num_tokens[page_id] = max(0, min(size, sequence.num_computed_tokens - i * size))
        return tuple(
            PageState(
                page_id,
                pages.state(page_id),
                pages.num_owners(page_id),
                size if page_id in self._cache.index else num_tokens.get(page_id, 0),
            )
            for page_id in map(PageId, range(1, pages.num_pages + 1))
        )

    def pins(self, tenant: str | None = None, name: str | None = None) -> tuple[PinState, ...]:
        """Pins, the oldest first: see `Pins.states`. O(pins)."""
        return self._cache.pins.states(self._clock(), tenant=tenant, name=name)

    def generate(
        self, prompts: Iterable[Sequence[int]], sampling: SamplingParams, *, n: int = 1
    ) -> list[list[Completion]]:
        """Complete each prompt (token ids), all of them batched; `n` outputs each.

        Raises BadRequest if one can't be served, KvPagingError if one failed; the others are
        aborted then. An interrupt within a step leaves the engine unusable: close it.
        """
        prefix = secrets.token_hex(8)
        requests = deque(
            Request(RequestId(f"{prefix}-{i}"), tuple(prompt), sampling, n)
            for i, prompt in enumerate(prompts)
        )
        completions = {
            request.request_id: [Completion(request.request_id, k) for k in range(n)]
            for request in requests
        }
        try:
            while requests or self.has_work:
                room = self.config.scheduler.max_num_waiting - self._scheduler.num_waiting
                arrivals = [Arrival(requests.popleft()) for _ in range(min(room, len(requests)))]
                _collect(self.step(arrivals), completions)
        except LawBroken:
            raise  # this engine is over
        except KvPagingError:
            self.step([Abort(request_id) for request_id in completions])
            raise
        return list(completions.values())

    def store_rest(self) -> None:
        """Let all that waits to be copied down go, whatever is unfinished: `close` comes next."""
        self._cache.hurry_stores()
        stores = self._cache.take_stores()
        if stores:
            step_id = StepId((self._held[-1].plan.step_id if self._held else self._step_id) + 1)
            plan = StepPlan(step_id, removed=(), added=(), copies=(), scheduled=(), stores=stores)
            self._executor.submit(plan).result()

    def close(self) -> None:
        """Give the device's memory back, and close the levels below."""
        self._executor.close()
        if self._recorder is not None:
            self._recorder.close()


def make_recorder(
    options: EngineOptions, config: EngineConfig, executor: Executor
) -> Recorder | None:
    """A recorder where the options ask for one. Raises ConfigError if its file can't be made."""
    if options.record is None:
        return None
    return Recorder(create_file(Path(options.record)), config.scheduler, executor.lower_levels)


def _collect(outputs: StepOutputs, completions: dict[RequestId, list[Completion]]) -> None:
    """Add a step's outputs to the completions they belong to; raises for one that failed."""
    for rejection in outputs.rejections:
        raise BadRequest(rejection.message, param=rejection.param, code=rejection.code)
    for output in outputs.outputs:
        if output.request_id not in completions:
            continue
        completion = completions[output.request_id][output.output_index]
        completion.samples.extend(output.samples)
        completion.prompt_samples.extend(output.prompt_samples)
        completion.num_cached_tokens = output.num_cached_tokens
        completion.finished = output.finished
        if output.finished is not None and output.finished.reason is FinishReason.ERROR:
            raise KvPagingError(output.finished.message or "the output failed")
