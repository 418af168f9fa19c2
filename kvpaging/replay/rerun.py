"""A recording through the same scheduler again, step by step: every decision must be the same.

Tokens are made up, as in full mode: the last one of a page is the page's number and the others are
0, so two sequences share a page here exactly if they did in the live run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from kvpaging.base.errors import ConfigError
from kvpaging.base.evictions import Evicted
from kvpaging.base.ids import PageKey, RequestId, SeqId
from kvpaging.cache.cache_manager import CacheManager
from kvpaging.cache.eviction.names import POLICIES
from kvpaging.cache.lower_levels import Held, LevelsFlushed, PagesLoaded, PagesLost
from kvpaging.cache.prefix_key import ChainLink
from kvpaging.replay.full_mode import FILLER, VOCAB_SIZE, page_tokens
from kvpaging.replay.recording import (
    Header,
    PageNumbers,
    RecordedAbort,
    RecordedArrival,
    RecordedEvent,
    RecordedFinish,
    RecordedFlush,
    RecordedStep,
    RecordedUnpin,
    plan_digest,
    read_header,
    read_steps,
)
from kvpaging.replay.trace import open_binary
from kvpaging.scheduling.events import Abort, Arrival, Event, Finish, Flush, Unpin
from kvpaging.scheduling.plan import Sample, StepPlan, StepResult
from kvpaging.scheduling.request import Request, SamplingParams
from kvpaging.scheduling.scheduler import Scheduler

STOP_TOKEN = VOCAB_SIZE - 1


class Rerun(msgspec.Struct, frozen=True):
    """How the decisions compare."""

    num_steps: int
    first_difference: int | None
    """The first step whose plan differs from the recorded one."""
    num_requests: int
    hit_ratio_tokens: float
    num_evicted_pages: int
    num_preemptions: int
    seconds: float

    def in_words(self) -> str:
        """One line."""
        verdict = "every decision as recorded"
        if self.first_difference is not None:
            verdict = f"decisions differ from step {self.first_difference} on"
        return (
            f"{self.num_steps} steps, {self.num_requests} requests: {verdict}; hit ratio (tokens) "
            f"{self.hit_ratio_tokens:.4f}, {self.num_evicted_pages} pages evicted, "
            f"{self.num_preemptions} preemptions; {self.seconds:.2f} s"
        )

    def as_json(self) -> dict[str, object]:
        """All fields."""
        fields: dict[str, object] = msgspec.to_builtins(self)
        return fields


class _RecordedLevels:
    """Answers as the levels of the live run did."""

    def __init__(self, header: Header):
        self.names = header.level_names
        self.store_at_uses = header.store_at_uses or ()
        self.wants_evicted = header.wants_evicted
        self.answers: list[tuple[Held, ...]] = []
        self.rooms: list[int] = []

    def num_storable(self) -> int:
        """The next recorded answer; nothing where the live run did not ask."""
        return self.rooms.pop(0) if self.rooms else 0

    def probe(self, links: Sequence[ChainLink]) -> tuple[Held, ...]:
        """The next recorded answer; nothing where the live run did not ask."""
        return self.answers.pop(0) if self.answers else ()

    def evicted(self, keys: Sequence[PageKey]) -> dict[str, list[Evicted | None]]:
        """Nothing: nobody asks for explanations here."""
        return {}

    @property
    def other_roots(self) -> tuple[PageKey, ...]:
        """Nothing, as above."""
        return ()

    def holder(self, key: PageKey) -> str | None:
        """Nothing, as above."""
        return None


class _RecordedExecutor:
    """Samples what a step is recorded to have sampled."""

    def __init__(self, page_size: int, numbers: PageNumbers):
        self._page_size = page_size
        self._numbers = numbers
        self._rows: dict[SeqId, tuple[int, int]] = {}
        """(request, its prompt's tokens)."""

    def run(self, plan: StepPlan, step: RecordedStep) -> StepResult:
        for seq_id in plan.removed:
            self._rows.pop(seq_id)
        for added in plan.added:
            self._rows[added.seq_id] = (added.sampling.seed, added.num_prompt_tokens)
        pages = {(p.request, p.output_index, p.page_index): p.page for p in step.pages}
        stops = {(end.request, end.output_index): end.num_tokens for end in step.stops}
        failures = {(end.request, end.output_index) for end in step.failures}
        samples, failed, prompts = [], [], []
        for entry in plan.scheduled:
            request, num_prompt = self._rows[entry.seq_id]
            position = entry.start + entry.num_new_tokens
            chosen = []
            for index in entry.sample_for:
                token = 0
                if (position + 1) % self._page_size == 0:
                    page = pages.get((request, index, position // self._page_size))
                    token = 0 if page is None else self._numbers.of(page)
                if stops.get((request, index)) == position + 1 - num_prompt:
                    token = STOP_TOKEN
                chosen.append(Sample(token))
            # Where no logits are looked at, none are found to be no numbers.
            scored_for = () if entry.prompt_logprobs is None else (0,)
            if any((request, index) in failures for index in entry.sample_for or scored_for):
                failed.append(entry.seq_id)
                chosen = []
            samples.append(tuple(chosen))
            followed = min(position, num_prompt - 1) - entry.start
            asked = entry.prompt_logprobs is not None and entry.seq_id not in failed
            prompts.append((FILLER,) * (followed if asked else 0))
        return StepResult(
            plan.step_id,
            tuple(samples),
            tuple(failed),
            step.elapsed_s,
            tuple(prompts) if any(prompts) else (),
        )


def rerun(path: Path, *, on_plan: Callable[[StepPlan], None] | None = None) -> Rerun:
    """Go through a recording and compare every plan. Raises ConfigError if it can't be read."""
    started = time.perf_counter()
    with open_binary(path) as file:
        header = read_header(file.readline())
        config = header.scheduler
        if config.eviction_policy not in POLICIES:
            raise ConfigError(f"the recording's policy {config.eviction_policy!r} is not known")
        levels = None if header.store_at_uses is None else _RecordedLevels(header)
        cache = CacheManager(
            config.num_pages,
            config.page_size,
            prefix_cache=config.prefix_cache,
            policy=partial(POLICIES[config.eviction_policy], config.num_pages),
            levels=levels,
            max_pinned_pages=config.max_pinned_pages,
        )
        scheduler = Scheduler(config, cache, vocab_size=VOCAB_SIZE)
        numbers = PageNumbers()
        executor = _RecordedExecutor(config.page_size, numbers)
        held: deque[tuple[StepPlan, RecordedStep]] = deque()

        def apply_first() -> None:
            plan, step = held.popleft()
            scheduler.apply(plan, executor.run(plan, step), step.at_s)

        num_steps = num_requests = 0
        first_difference = None
        for step in read_steps(file):
            while len(held) > step.num_held:
                apply_first()
            if levels is not None:
                levels.answers, levels.rooms = list(step.probes), list(step.store_rooms)
            events = [_event(event, numbers, config.page_size) for event in step.events]
            num_requests += sum(isinstance(event, Arrival) for event in events)
            plan = scheduler.schedule(events, step.at_s)
            if on_plan is not None:
                on_plan(plan)
            num_steps += 1
            if plan_digest(plan) != step.decisions:
                first_difference = step.step_id
                held.clear()
                break
            held.append((plan, step))
        while held:
            apply_first()
    counters = cache.counters
    return Rerun(
        num_steps=num_steps,
        first_difference=first_difference,
        num_requests=num_requests,
        hit_ratio_tokens=counters.hit_tokens / max(1, counters.queried_tokens),
        num_evicted_pages=cache.evictions.num_evicted,
        num_preemptions=scheduler.counters.preemptions,
        seconds=time.perf_counter() - started,
    )


def _event(event: RecordedEvent, numbers: PageNumbers, page_size: int) -> Event:
    match event:
        case RecordedArrival():
            pages = [numbers.of(page) for page in event.pages]
            tokens = page_tokens(pages, event.num_prompt_tokens, page_size)
            sampling = SamplingParams(
                max_new_tokens=event.max_new_tokens,
                seed=event.request,
                stop_token_ids=(STOP_TOKEN,),
                prompt_logprobs=event.prompt_logprobs,
            )
            return Arrival(
                Request(
                    _id(event.request),
                    tuple(tokens),
                    sampling,
                    event.n,
                    event.priority,
                    tenant=str(event.tenant),
                    tenant_pages=event.tenant_pages,
                    retention=event.retention,
                    is_idle=event.is_idle,
                )
            )
        case RecordedAbort(request):
            return Abort(_id(request))
        case RecordedFlush(query_id, level):
            return Flush(query_id, level)
        case RecordedUnpin(request):
            return Unpin(_id(request))
        case RecordedFinish(request, output_index, num_tokens):
            return Finish(_id(request), output_index, num_tokens)
        case PagesLoaded() | PagesLost() | LevelsFlushed():
            return event


def _id(number: int) -> RequestId:
    return RequestId(str(number))
