"""Who runs in the next step, with how many tokens, on which pages.

There is no prefill phase and no decode phase: every sequence catches up its computed tokens to its
known tokens within a token budget. Chunked prefill, prefix hits, preemption and forks all fall out
of that one rule. `schedule` reserves, `apply` commits, and nothing else changes state; two plans
may be held at once, since what `schedule` decides rests on what is planned, not on what is applied.

Knows token ids and page ids; no text, no tensor, no clock (the time comes in with each call).
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import islice
from typing import Final, assert_never

from kvpaging.base.config import SchedulerConfig
from kvpaging.base.errors import BadRequest, ConfigError, LawBroken, TooManyPinned
from kvpaging.base.ids import PageId, RequestId, SeqId, StepId
from kvpaging.cache.allocator import OutOfPages
from kvpaging.cache.cache_manager import CacheManager
from kvpaging.cache.explanation import DEVICE, Lookup
from kvpaging.cache.load_costs import LoadChoices, LoadCosts
from kvpaging.cache.lower_levels import (
    Held,
    LevelFlush,
    LevelsFlushed,
    PageLoad,
    PagesLoaded,
    PagesLost,
)
from kvpaging.cache.page_lease import PageLease
from kvpaging.cache.pins import PinsFull
from kvpaging.cache.prefix_key import PrefixChain
from kvpaging.scheduling import admission
from kvpaging.scheduling.events import Abort, Arrival, Event, Finish, Flush, Unpin
from kvpaging.scheduling.outputs import (
    Finished,
    FinishReason,
    Flushed,
    Recomputed,
    Rejection,
    SequenceOutput,
    StepOutputs,
)
from kvpaging.scheduling.plan import (
    AddedSequence,
    PageCopy,
    Sample,
    ScheduledSequence,
    StepPlan,
    StepResult,
)
from kvpaging.scheduling.request import Request
from kvpaging.scheduling.sequence import Order, SeqState, Sequence
from kvpaging.scheduling.waiting_queue import WaitingQueue

MAX_LOADS: Final = 8
"""Where so many sequences load, none is begun before its turn: they are served one by one."""
LOOK_AHEAD: Final = 16
"""So many from the first in the queue on may load before their turn."""
MAX_HASHED_TOKENS: Final = 16_384
"""Of waiting sequences, that a step hashes while others run, a page at least: twice the prompt
tokens that a large step computes, so that hashing is never what a prompt waits for most. With pages
of 16 tokens that takes some 2 ms; a token costs more the fewer share a page."""


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since the start."""

    preemptions: int = 0
    recomputed_tokens: int = 0
    computed_tokens: int = 0
    loaded_pages: int = 0


class _Draft:
    """A plan in the making: entries may still be taken back when their sequence is preempted."""

    __slots__ = (
        "budget",
        "copies",
        "draws",
        "entries",
        "has_preempted",
        "hashes",
        "loads",
        "now_s",
    )

    def __init__(self, now_s: float, budget: int, draws: int, page_size: int):
        self.now_s = now_s
        self.budget = budget
        self.draws = draws
        """Tokens that may still be sampled: each takes a row of logits."""
        self.hashes = max(1, MAX_HASHED_TOKENS // page_size)
        """Pages that may still be hashed."""
        self.entries: dict[SeqId, tuple[Sequence, ScheduledSequence]] = {}
        self.copies: list[PageCopy] = []
        self.loads: list[PageLoad] = []
        self.has_preempted = False


class Scheduler:
    """Continuous batching over pages; see the module."""

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheManager,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int] = frozenset(),
    ):
        if config.max_num_batched_tokens < config.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {config.max_num_batched_tokens} and must be at least "
                f"max_num_seqs ({config.max_num_seqs}): each running sequence needs one a step"
            )
        self.config = config
        self.cache = cache
        self.counters = SchedulerCounters()
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._requests: dict[RequestId, list[Sequence]] = {}
        """Outputs of each request that have not ended; a request without one is gone."""
        self._sequences: dict[SeqId, Sequence] = {}
        """Sequences that have not ended, and ended ones that a plan in flight names."""
        self._waiting = WaitingQueue()
        self._unhashed: deque[Sequence] = deque()
        """Arrived ones, in that order, whose prompts may not be hashed to the end yet."""
        self._running: list[Sequence] = []
        self._loading: dict[SeqId, Sequence] = {}
        self._load_costs = LoadCosts()
        self._forked: list[Sequence] = []
        """Running sequences whose tail page must be copied before the next step."""
        self._removed: list[SeqId] = []
        self._copied: dict[StepId, tuple[PageId, ...]] = {}
        """Pages kept from being overwritten until the step that copies from them is applied."""
        self._flushes: list[LevelFlush] = []
        """For the next plan."""
        self._flushing: dict[int, dict[str, int | None]] = {}
        """Flushes that levels below work on, with what the device gave."""
        self._flushed: list[Flushed] = []
        self._outputs: list[SequenceOutput] = []
        self._rejections: list[Rejection] = []
        self._blocked: Sequence | None = None
        """The first in the queue when it was last found not to fit, and ..."""
        self._blocked_at = 0
        """... the pages that were available then."""
        self._num_unplaced = 0
        """Requests that have not been placed yet, for the bound on the queue."""
        self._next_step = 1
        self._num_sequences = 0
        self._num_arrivals = 0

    # --- questions ---------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """A step would compute something, free rows, copy pages down, or tell somebody."""
        return bool(
            self._sequences
            or self._removed
            or self._outputs
            or self._rejections
            or self._flushing
            or self._flushed
            or self.cache.is_emptying
            or self.cache.has_stores
        )

    @property
    def num_running(self) -> int:
        """Sequences that own pages and may be planned."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for pages or for a place."""
        return len(self._waiting)

    @property
    def waits_for_levels(self) -> bool:
        """Levels below load pages, or are being emptied."""
        return bool(self._loading or self._flushing)

    @property
    def num_loading(self) -> int:
        """Sequences whose pages a lower level is filling."""
        return len(self._loading)

    @property
    def load_choices(self) -> LoadChoices:
        """What was measured of loading and computing, and what was chosen."""
        return self._load_costs.choices()

    @property
    def running(self) -> Items[Sequence]:
        """In the order in which they are served. Not to be changed."""
        return self._running

    @property
    def num_wasted_slots(self) -> int:
        """Slots of running sequences' pages that hold no planned token. O(running)."""
        size = self.cache.page_size
        return sum(
            len(s.lease.pages) * size - s.num_scheduled_tokens for s in self._running if s.lease
        )

    # --- schedule ----------------------------------------------------------------------------

    def schedule(self, events: Items[Event], now: float) -> StepPlan:
        """Take the events in, in order, and plan the next step; reserves pages for it."""
        self.cache.advance(now)
        for event in events:
            self._take_in(event, now)
        self._stop_idle()
        draft = _Draft(
            now,
            self.config.max_num_batched_tokens,
            self.config.max_num_seqs,
            self.cache.page_size,
        )
        step_id = StepId(self._next_step)
        self._next_step += 1
        self._plan_copies(draft, step_id)
        self._plan_running(draft)
        if not draft.has_preempted:
            self._plan_waiting(draft)
            self._look_ahead(draft)
        self._hash_ahead(draft)
        removed, self._removed = tuple(self._removed), []
        flushes, self._flushes = tuple(self._flushes), []
        return StepPlan(
            step_id=step_id,
            removed=removed,
            added=self._added(draft),
            copies=tuple(draft.copies),
            scheduled=tuple(entry for _, entry in draft.entries.values()),
            stores=self.cache.take_stores(),
            touches=self.cache.take_touches(),
            loads=tuple(draft.loads),
            flushes=flushes,
        )

    def _take_in(self, event: Event, now: float) -> None:
        match event:
            case Arrival(request):
                self._arrive(request, now)
            case Abort(request_id):
                for sequence in tuple(self._requests.get(request_id, ())):
                    self._end(sequence, FinishReason.ABORT, ())
            case Finish(request_id, output_index):
                for sequence in tuple(self._requests.get(request_id, ())):
                    if sequence.is_forked and sequence.output_index == output_index:
                        self._end(sequence, FinishReason.STOP, ())
            case Unpin(request_id):
                if request_id in self.cache.pins:
                    self.cache.drop_pin(request_id)
            case Flush(query_id, level):
                self._flush(query_id, level)
            case PagesLoaded():
                self._take_loaded(event)
            case PagesLost():
                self.cache.store_again(event)
            case LevelsFlushed(query_id, pages, failed):
                pages = self._flushing.pop(query_id) | pages
                self._flushed.append(Flushed(query_id, pages, failed))
            case _:
                assert_never(event)

    def _flush(self, query_id: int, level: str | None) -> None:
        """Empty the device now, and let the levels below be emptied.

        What waits to be copied down is dropped; where other levels want it as well it goes down
        before, and leaves this one with the rest. A level that is not here changes nothing.
        """
        pages: dict[str, int | None] = {}
        if level in (None, DEVICE):
            pages[DEVICE] = self.cache.flush()
        levels = tuple(name for name in self.cache.level_names if level in (None, name))
        if levels:
            if levels == self.cache.level_names:
                self.cache.drop_stores()
            else:
                self.cache.hurry_stores()
            self._flushes.append(LevelFlush(query_id, levels))
            self._flushing[query_id] = pages
        else:
            self._flushed.append(Flushed(query_id, pages))

    def _arrive(self, request: Request, now: float) -> None:
        rejection = self._refusal(request)
        if rejection is not None:
            self._rejections.append(rejection)
            return
        chain = self.cache.chain(request.namespace, request.shared)
        if request.retention.pin:  # whether it may is said at the door, and depends on its keys
            self.cache.extend(chain, request.prompt_token_ids)
        try:
            self._promise_pin(request, chain)
        except BadRequest as error:
            self._rejections.append(_rejection(request, error))
            return
        self._num_arrivals += 1
        sequence = Sequence(
            self._new_seq_id(),
            request,
            0,
            chain,
            arrival_index=self._num_arrivals,
            arrival_s=now,
        )
        self._sequences[sequence.seq_id] = sequence
        self._requests[request.request_id] = [sequence]
        self._num_unplaced += 1
        self._unhashed.append(sequence)
        self._waiting.push(sequence)

    def _refusal(self, request: Request) -> Rejection | None:
        if request.request_id in self._requests:
            return Rejection(
                request.request_id,
                f"a request with the id {request.request_id!r} is already here",
                code="duplicate_request",
            )
        try:
            admission.check(request, self.config, self._vocab_size)
        except BadRequest as error:
            return _rejection(request, error)
        if self._num_unplaced >= self.config.max_num_waiting:
            return Rejection(
                request.request_id,
                f"{self._num_unplaced} requests wait, and {self.config.max_num_waiting} may",
                code="overloaded",
            )
        return None

    def _promise_pin(self, request: Request, chain: PrefixChain) -> None:
        """Count the pages that the request wants pinned. Raises BadRequest, nothing changed."""
        if not request.retention.pin:
            return
        name = request.request_id
        if name in self.cache.pins:
            raise BadRequest(f"a pin with the id {name!r} is here", code="duplicate_pin")
        try:
            self.cache.promise_pin(
                name, request.tenant, request.tenant_pages, chain, request.retention.ttl_s
            )
        except PinsFull as full:
            own = full.pinned if full.is_tenants else None
            raise TooManyPinned(full.needed, full.limit, own) from None

    def _keep_pin(self, sequence: Sequence, lease: PageLease) -> None:
        """Its prompt is computed: where a pin of it was promised, keep it."""
        name = sequence.request.request_id
        if self.cache.pins.is_promised(name):
            self.cache.keep_pin(name, lease, sequence.chain)

    def _stop_idle(self) -> None:
        """Idle work gives way to a request that waits: pages and place, at once."""
        first = self._waiting.first()
        if first is None or first.request.is_idle:
            return
        for sequence in reversed(self._running):
            if not sequence.request.is_idle:
                return
            if not sequence.num_in_flight:
                self._preempt(sequence)

    def _plan_copies(self, draft: _Draft, step_id: StepId) -> None:
        sources = []
        for sequence in self._forked:
            source, sequence.copy_from = sequence.copy_from, None
            if source is not None and sequence.lease is not None:
                draft.copies.append(PageCopy(source, sequence.lease.pages[-1]))
                sources.append(source)
        self._forked.clear()
        if sources:
            self._copied[step_id] = tuple(sources)

    def _plan_running(self, draft: _Draft) -> None:
        """Sequences with one token to go first: a long prompt must not hold up the others' decode.

        That starves nobody: `max_num_batched_tokens` is at least `max_num_seqs`.
        """
        prompts = []
        for sequence in self._plannable():
            num_to_go = self._num_to_go(sequence)
            if num_to_go == 1:
                self._plan_one(sequence, 1, draft)
            elif num_to_go:
                prompts.append(sequence)
        for sequence in prompts:
            if draft.budget and sequence.state is SeqState.RUNNING:
                self._plan_one(sequence, min(self._num_to_go(sequence), draft.budget), draft)

    def _plannable(self) -> tuple[Sequence, ...]:
        """Running sequences that may be planned: idle ones only if there is no other work."""
        running = tuple(self._running)
        if running and running[-1].request.is_idle:
            first = self._waiting.first()
            is_other = first is not None and not first.request.is_idle
            if is_other or not running[0].request.is_idle:
                return tuple(s for s in running if not s.request.is_idle)
        return running

    def _num_to_go(self, sequence: Sequence) -> int:
        """Tokens that could be planned now: known ones, and one that a plan in flight samples."""
        if not sequence.num_pending:
            return len(sequence.token_ids) - sequence.num_scheduled_tokens
        num_tokens = len(sequence.token_ids) + sequence.num_pending
        limit = sequence.num_prompt_tokens + sequence.request.sampling.max_new_tokens
        if not sequence.is_forked or num_tokens >= limit:
            return 0  # it forks, or ends, when that plan is applied
        return num_tokens - sequence.num_scheduled_tokens

    def _plan_one(self, sequence: Sequence, num_new_tokens: int, draft: _Draft) -> None:
        lease = sequence.lease
        if lease is None or sequence.state is not SeqState.RUNNING:
            return  # preempted for the sake of one before it in this very plan
        start = sequence.num_scheduled_tokens
        num_new_tokens = self._within_draws(sequence, start, num_new_tokens, draft)
        if not num_new_tokens:
            return
        end = start + num_new_tokens
        new_pages: tuple[PageId, ...] = ()
        if end > len(lease.pages) * self.cache.page_size:
            while True:
                try:
                    new_pages = self.cache.grow(lease, end)
                    break
                except OutOfPages:
                    if not self._preempt_for(sequence, draft):
                        return
        self._put(sequence, num_new_tokens, new_pages, draft)

    def _put(
        self,
        sequence: Sequence,
        num_new_tokens: int,
        new_pages: tuple[PageId, ...],
        draft: _Draft,
    ) -> None:
        start = sequence.num_scheduled_tokens
        end = start + num_new_tokens
        samples = end >= len(sequence.token_ids)
        sample_for = self._sample_for(sequence) if samples else ()
        draft.draws -= len(sample_for)
        is_scored = sequence.wants_scores and (
            start < sequence.num_prompt_tokens - 1 and end > sequence.num_scored_tokens
        )
        draft.entries[sequence.seq_id] = (
            sequence,
            ScheduledSequence(
                sequence.seq_id,
                start,
                num_new_tokens,
                new_pages if sequence.has_row else (),
                sample_for,
                sequence.request.sampling.prompt_logprobs if is_scored else None,
            ),
        )
        draft.budget -= num_new_tokens
        sequence.num_scheduled_tokens = end
        sequence.num_in_flight += 1
        if samples:
            sequence.num_pending += 1

    @staticmethod
    def _within_draws(sequence: Sequence, start: int, num_new_tokens: int, draft: _Draft) -> int:
        """One token less where a fork's first tokens would be more than the step may sample."""
        if sequence.is_forked:
            return num_new_tokens  # running ones are at most `max_num_seqs`
        ends = start + num_new_tokens >= len(sequence.token_ids)
        return num_new_tokens - (ends and sequence.request.n > draft.draws)

    @staticmethod
    def _sample_for(sequence: Sequence) -> tuple[int, ...]:
        if sequence.is_forked:
            return sequence.sample_self
        return tuple(range(sequence.request.n))

    def _preempt_for(self, sequence: Sequence, draft: _Draft) -> bool:
        """Take the pages of the last in order that no plan in flight reads.

        Returns whether `sequence` itself still runs and it is worth trying again.
        """
        # None before it; and none before a load that holds pages, which gives them back soon.
        first = max([sequence.order, *(loading.order for loading in self._loading.values())])
        for victim in reversed(self._running):
            if victim.order < first:
                return False
            planned = draft.entries.get(victim.seq_id)
            if victim.num_in_flight > (planned is not None):
                continue  # a running step reads its pages: they would not be free
            if planned is not None:
                self._take_back(victim, planned[1], draft)
            self._preempt(victim)
            draft.has_preempted = True
            return victim is not sequence
        return False

    @staticmethod
    def _take_back(sequence: Sequence, entry: ScheduledSequence, draft: _Draft) -> None:
        del draft.entries[sequence.seq_id]
        draft.budget += entry.num_new_tokens
        draft.draws += len(entry.sample_for)
        sequence.num_in_flight -= 1
        sequence.num_pending -= bool(entry.sample_for)

    def _preempt(self, sequence: Sequence) -> None:
        """By recompute: pages go back (and stay findable while nobody needs them)."""
        self._running.remove(sequence)
        self._drop_pages(sequence)
        sequence.move(SeqState.PREEMPTED)
        sequence.num_computed_before = max(
            sequence.num_computed_before, sequence.num_computed_tokens
        )
        sequence.num_computed_tokens = sequence.num_scheduled_tokens = 0
        sequence.has_loaded = False
        sequence.num_preemptions += 1
        self.counters.preemptions += 1
        self._waiting.push(sequence)

    def _plan_waiting(self, draft: _Draft) -> None:
        promised = self._num_promised_pages()
        while draft.budget and len(self._running) < self.config.max_num_seqs:
            sequence = self._waiting.first()
            if sequence is None:
                return
            if sequence.request.is_idle and (self._running or self._loading):
                return
            if (
                sequence is self._blocked
                and self.cache.num_available <= self._blocked_at
                and self._will_give_back
            ):
                return  # nothing came back since it was found not to fit
            if not self._hash(sequence, draft):
                if self._running:
                    return  # it is first in the next step too
                self.cache.extend(sequence.chain, sequence.token_ids)  # that holds up nobody
            num_tokens = sequence.num_tokens
            matched = self.cache.match(sequence.chain, sequence.num_findable_tokens)
            if not sequence.has_loaded:
                worth = self._to_load(sequence, matched, draft.now_s)
                if self._load(sequence, matched, worth, draft, self._reserve(promised)):
                    sequence.has_loaded = True
                    continue
                sequence.has_loaded = not worth
            needed = self.cache.num_new_pages(matched, num_tokens)
            if needed + self._reserve(promised) > self.cache.num_available:
                if self._will_give_back:
                    self._blocked, self._blocked_at = sequence, self.cache.num_available
                    return
                self._fail_for_pages(sequence)
                continue
            num_cached = len(matched) * self.cache.page_size
            chunk = min(num_tokens - num_cached, draft.budget)
            chunk = self._within_draws(sequence, num_cached, chunk, draft)
            if not chunk:
                return
            self._waiting.pop()
            sequence.lease = self._lease(sequence, matched, num_cached + chunk)
            self.cache.touch(sequence.chain, matched)
            self._admit(sequence, num_cached, draft.now_s)
            self._put(sequence, chunk, (), draft)
            promised += self.cache.pages_for(num_tokens) - len(sequence.lease.pages)

    def _hash(self, sequence: Sequence, draft: _Draft) -> bool:
        """Add to its chain what this step may still hash; returns whether that was all."""
        missing = self.cache.num_unhashed(sequence.chain, sequence.num_tokens)
        num_pages = min(missing, draft.hashes)
        if num_pages:
            self.cache.extend(sequence.chain, sequence.token_ids, num_pages)
            draft.hashes -= num_pages
        return num_pages == missing

    def _hash_ahead(self, draft: _Draft) -> None:
        """What the step may still hash goes to those that wait behind, as they arrived."""
        while self._unhashed:
            first = self._unhashed[0]
            if first.state is SeqState.WAITING and not self._hash(first, draft):
                return
            self._unhashed.popleft()

    def _lease(self, sequence: Sequence, matched: list[PageId], num_tokens: int) -> PageLease:
        request = sequence.request
        budget = self.cache.budgets.of(request.tenant, request.tenant_pages)
        return self.cache.reserve(matched, num_tokens, request.retention, budget)

    @property
    def _will_give_back(self) -> bool:
        """Some sequence owns pages, and will end or lose them."""
        return bool(
            self._running
            or self._loading
            or self._copied
            or any(sequence.lease is not None for sequence in self._sequences.values())
        )

    def _reserve(self, promised: int) -> int:
        """Pages to leave when one more is let in.

        Each running sequence may soon need one: else what is admitted now were preempted at once.
        """
        return promised + len(self._running) if self._running else 0

    def _look_ahead(self, draft: _Draft) -> None:
        """Begin loads for those that wait behind, into pages that nobody before them will need."""
        if not self.cache.has_levels:
            return
        spoken_for = self._num_promised_pages() + len(self._running)
        spoken_for += sum(map(self._num_missing_pages, self._loading.values()))
        for sequence in tuple(islice(self._waiting.upcoming(), LOOK_AHEAD)):
            if sequence.request.is_idle:
                return
            if len(self._loading) >= MAX_LOADS or spoken_for >= self.cache.num_available:
                return
            if not sequence.was_looked_ahead and not sequence.has_loaded:
                if not self._hash(sequence, draft):
                    return
                sequence.was_looked_ahead = True
                matched = self.cache.match(sequence.chain, sequence.num_findable_tokens)
                worth = self._to_load(sequence, matched, draft.now_s)
                self._load(sequence, matched, worth, draft, spoken_for)
            spoken_for += self._num_missing_pages(sequence)

    def _to_load(self, sequence: Sequence, matched: list[PageId], now: float) -> tuple[Held, ...]:
        """Pages after the matched ones that lower levels should fill.

        None while a level is being emptied: what it still had would be found after that.
        """
        if self._flushing:
            return ()
        held = self.cache.held_below(sequence.chain, len(matched), sequence.num_findable_tokens)
        worth = self._load_costs.worth_loading(held, self.cache.page_size, now)
        if held and not sequence.was_admitted:
            sequence.lookup = sequence.lookup or Lookup()
            sequence.lookup.probed(len(matched), held, _num_pages(worth))
        return worth

    def _load(
        self,
        sequence: Sequence,
        matched: list[PageId],
        worth: tuple[Held, ...],
        draft: _Draft,
        reserve: int,
    ) -> bool:
        """Let lower levels fill these pages for it while it waits; leave `reserve` to others.

        Returns whether it left the queue; it comes back to its place with `PagesLoaded`.
        """
        num_pages = _num_pages(worth)
        num_tokens = (len(matched) + num_pages) * self.cache.page_size
        needed = self.cache.num_new_pages(matched, num_tokens)
        if not num_pages or needed + reserve > self.cache.num_available:
            return False
        self._load_costs.begun(worth, draft.now_s)
        self._waiting.take(sequence)
        sequence.lease = self._lease(sequence, matched, num_tokens)
        sequence.move(SeqState.LOADING)
        sequence.num_in_flight += 1
        if sequence.lookup is not None:
            sequence.lookup.begun()
        self._loading[sequence.seq_id] = sequence
        first = len(matched)
        draft.loads.append(
            PageLoad(
                sequence.seq_id,
                tuple(sequence.lease.pages[first:]),
                tuple(sequence.chain.links[first : first + num_pages]),
            )
        )
        return True

    def _take_loaded(self, event: PagesLoaded) -> None:
        """Publish what came; the sequence waits on, and will match it like any other page."""
        sequence = self._loading.pop(event.seq_id, None)
        if sequence is None or sequence.lease is None:
            raise LawBroken(f"pages were loaded for sequence {event.seq_id}, which asked for none")
        self.counters.loaded_pages += event.num_pages
        self._load_costs.loaded(event.levels)
        self.cache.counters.loaded(event.levels)
        if sequence.lookup is not None:
            sequence.lookup.loaded(event)
        self.cache.commit_loaded(sequence.lease, sequence.chain, event.num_pages)
        sequence.num_in_flight -= 1
        if sequence.state is SeqState.FINISHED:
            self._forget(sequence)
            return
        self._drop_pages(sequence)
        sequence.move(SeqState.WAITING)
        self._waiting.push(sequence)

    def _num_promised_pages(self) -> int:
        """Pages that running sequences still need for tokens they already have."""
        return sum(map(self._num_missing_pages, self._running))

    def _num_missing_pages(self, sequence: Sequence) -> int:
        """Pages that it needs for the tokens it has, and does not hold."""
        num_held = 0 if sequence.lease is None else len(sequence.lease.pages)
        return max(0, self.cache.pages_for(sequence.num_tokens) - num_held)

    def _fail_for_pages(self, sequence: Sequence) -> None:
        """Alone it doesn't fit, though it did at the door: pages were quarantined since.

        Raises LawBroken where pages are held that no sequence owns: nobody would give them back.
        """
        num_held = self.cache.allocator.num_held - self.cache.pins.num_owned
        if num_held:
            raise LawBroken(f"{num_held} pages are held, and no sequence and no pin owns them")
        self._end(
            sequence,
            FinishReason.ERROR,
            (),
            message=f"{self.cache.num_available} usable KV pages are left; it needs more",
        )

    def _admit(self, sequence: Sequence, num_cached: int, now: float) -> None:
        sequence.move(SeqState.RUNNING)
        insort(self._running, sequence, key=_order)
        sequence.num_computed_tokens = sequence.num_scheduled_tokens = num_cached
        recomputed = max(0, sequence.num_computed_before - num_cached)
        sequence.num_recomputed_tokens += recomputed
        if recomputed and sequence.request.explain:
            sequence.recomputed = (*sequence.recomputed, Recomputed(num_cached, recomputed))
        self.counters.recomputed_tokens += recomputed
        if not sequence.was_admitted:
            sequence.was_admitted = True
            self._num_unplaced -= 1
            sequence.num_cached_tokens = num_cached
            sequence.first_scheduled_s = now
            self._tell_placed(sequence, num_cached)

    def _tell_placed(self, sequence: Sequence, num_cached: int) -> None:
        """Count what was found of its prompt, and explain it where that was asked for."""
        lookup, sequence.lookup = sequence.lookup, None
        size, counters = self.cache.page_size, self.cache.counters
        loaded = {} if lookup is None else lookup.givers(num_cached // size)
        counters.placed(sequence.num_prompt_tokens, num_cached, size, loaded)
        counters.saved_s += num_cached * (self._load_costs.compute_s_per_token or 0.0)
        if lookup is not None:
            counters.saved_s -= lookup.elapsed_s
        found = self.cache.found(
            sequence.chain,
            sequence.num_prompt_tokens,
            sequence.num_findable_tokens,
            num_cached // size,
            lookup or Lookup(),
        )
        counters.missed_pages.update(self.cache.missed_pages(found))
        if sequence.request.explain:
            sequence.explanation = self.cache.explain(found, sequence.chain)

    def _added(self, draft: _Draft) -> tuple[AddedSequence, ...]:
        added = []
        for sequence, _ in draft.entries.values():
            if not sequence.has_row and sequence.lease is not None:
                sequence.has_row = True
                added.append(
                    AddedSequence(
                        sequence.seq_id,
                        tuple(sequence.token_ids),
                        sequence.num_prompt_tokens,
                        tuple(sequence.lease.pages),
                        sequence.request.sampling,
                        sequence.output_index,
                    )
                )
        return tuple(added)

    # --- apply -------------------------------------------------------------------------------

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> StepOutputs:
        """Commit what the plan did: tokens, keys, states, releases. Plans are applied in order.

        Sequences that ended since the plan was made are passed over; their pages go back when the
        last plan that reads them has been applied.
        """
        if result.step_id != plan.step_id or len(result.samples) != len(plan.scheduled):
            raise LawBroken(f"the result of step {result.step_id} is not of plan {plan.step_id}")
        for source in self._copied.pop(plan.step_id, ()):
            self.cache.unpin(source)
        failed = frozenset(result.failed)
        all_scores = result.prompt_logprobs or ((),) * len(plan.scheduled)
        for entry, samples, scores in zip(plan.scheduled, result.samples, all_scores, strict=True):
            self._commit(entry, samples, scores, entry.seq_id in failed, now)
        num_tokens = plan.num_new_tokens
        self.counters.computed_tokens += num_tokens
        if num_tokens >= 4 * len(plan.scheduled):  # decoding says little of what a prompt costs
            self._load_costs.computed(num_tokens, result.elapsed_s)
        outputs, self._outputs = tuple(self._outputs), []
        rejections, self._rejections = tuple(self._rejections), []
        flushed, self._flushed = tuple(self._flushed), []
        return StepOutputs(outputs, rejections, flushed)

    def _commit(
        self,
        entry: ScheduledSequence,
        samples: tuple[Sample, ...],
        scores: tuple[Sample, ...],
        failed: bool,
        now: float,
    ) -> None:
        sequence = self._sequences[entry.seq_id]
        sequence.num_in_flight -= 1
        if entry.sample_for:
            sequence.num_pending -= 1
        if sequence.state is SeqState.FINISHED:
            if not sequence.num_in_flight:
                self._forget(sequence)
            return
        end = entry.start + entry.num_new_tokens
        sequence.num_computed_tokens = end
        if failed:
            if sequence.lease is not None:
                self.cache.distrust(sequence.lease)
            self._end(
                sequence, FinishReason.ERROR, (), message="the model gave a value that is no number"
            )
            return
        lease = sequence.lease
        if lease is not None and end >= (lease.num_published + 1) * self.cache.page_size:
            self.cache.extend(sequence.chain, sequence.token_ids)
            self.cache.commit(lease, sequence.chain, end)
        if entry.prompt_logprobs is not None:
            self._send_scores(sequence, entry, scores)
        if entry.sample_for:
            if lease is not None and lease.num_proven < lease.num_published:
                self.cache.prove(lease, sequence.chain)
            if sequence.first_token_s is None and lease is not None:
                self._keep_pin(sequence, lease)
            twins = self._fork(sequence, samples) if len(samples) > 1 else ()
            sequence.is_forked = True
            self._append(sequence, samples[0], now)
            for twin, sample in zip(twins, samples[1:], strict=True):
                self._append(twin, sample, now)

    def _send_scores(
        self, sequence: Sequence, entry: ScheduledSequence, scores: tuple[Sample, ...]
    ) -> None:
        """Each once: after a preemption the first ones may have been sent before."""
        end = min(entry.start + entry.num_new_tokens, sequence.num_prompt_tokens - 1)
        if len(scores) != end - entry.start:
            raise LawBroken(f"sequence {sequence.seq_id}: {len(scores)} scores from {entry.start}")
        new = scores[sequence.num_scored_tokens - entry.start :]
        sequence.num_scored_tokens = end
        self._outputs.append(
            SequenceOutput(
                sequence.request.request_id,
                sequence.output_index,
                (),
                sequence.num_cached_tokens,
                prompt_samples=new,
            )
        )

    def _fork(self, sequence: Sequence, samples: tuple[Sample, ...]) -> list[Sequence]:
        """The request's other outputs, each with a lease if there is room, else waiting."""
        twins = []
        for output_index in range(1, len(samples)):
            twin = sequence.fork(self._new_seq_id(), output_index)
            self._sequences[twin.seq_id] = twin
            self._requests[twin.request.request_id].append(twin)
            self._place(twin, sequence)
            twins.append(twin)
        return twins

    def _place(self, twin: Sequence, sequence: Sequence) -> None:
        if sequence.lease is not None and len(self._running) < self.config.max_num_seqs:
            try:
                twin.lease, twin.copy_from = self.cache.fork(
                    sequence.lease, sequence.num_computed_tokens
                )
            except OutOfPages:
                pass
            else:
                twin.num_computed_tokens = sequence.num_computed_tokens
                twin.num_scheduled_tokens = sequence.num_computed_tokens
                twin.move(SeqState.RUNNING)
                insort(self._running, twin, key=_order)
                if twin.copy_from is not None:
                    self._forked.append(twin)
                return
        twin.num_computed_before = sequence.num_computed_tokens
        self._waiting.push(twin)

    def _append(self, sequence: Sequence, sample: Sample, now: float) -> None:
        sequence.token_ids.append(sample.token_id)
        if sequence.first_token_s is None:
            sequence.first_token_s = now
        sequence.last_token_s = now
        reason = self._ends_with(sequence, sample.token_id)
        if reason is not None:
            stop_token_id = sample.token_id if reason is FinishReason.STOP else None
            self._end(sequence, reason, (sample,), stop_token_id=stop_token_id)
            return
        self._outputs.append(
            SequenceOutput(
                sequence.request.request_id,
                sequence.output_index,
                (sample,),
                sequence.num_cached_tokens,
            )
        )

    def _ends_with(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        sampling = sequence.request.sampling
        if sequence.num_output_tokens >= sampling.min_new_tokens and (
            (token_id in self._eos_token_ids and not sampling.ignore_eos)
            or token_id in sampling.stop_token_ids
        ):
            return FinishReason.STOP
        if sequence.num_output_tokens >= sampling.max_new_tokens:
            return FinishReason.LENGTH
        return None

    # --- endings -----------------------------------------------------------------------------

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        samples: tuple[Sample, ...],
        *,
        stop_token_id: int | None = None,
        message: str | None = None,
    ) -> None:
        """The one way out, from any state."""
        if sequence.state is SeqState.RUNNING:
            self._running.remove(sequence)
        elif sequence.state is not SeqState.LOADING:
            self._waiting.discard()
        sequence.move(SeqState.FINISHED)
        self._num_unplaced -= not sequence.was_admitted
        finished = Finished(
            reason,
            stop_token_id,
            sequence.timings(),
            sequence.num_preemptions,
            sequence.num_recomputed_tokens,
            message,
            sequence.explanation,
            sequence.recomputed,
        )
        # One that has not forked ends for all the outputs that it stands for.
        for output_index in self._sample_for(sequence):
            self._outputs.append(
                SequenceOutput(
                    sequence.request.request_id,
                    output_index,
                    samples,
                    sequence.num_cached_tokens,
                    finished,
                )
            )
        siblings = self._requests[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request.request_id]
            if self.cache.pins.is_promised(sequence.request.request_id):
                self.cache.drop_pin(sequence.request.request_id)
        if not sequence.num_in_flight:
            self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        """No plan in flight names it any more: its pages go back."""
        del self._sequences[sequence.seq_id]
        self._drop_pages(sequence)

    def _drop_pages(self, sequence: Sequence) -> None:
        if sequence.copy_from is not None:
            self.cache.unpin(sequence.copy_from)
            sequence.copy_from = None
        if sequence.lease is not None:
            self.cache.release(sequence.lease)
            sequence.lease = None
        if sequence.has_row:
            self._removed.append(sequence.seq_id)
            sequence.has_row = False

    def _new_seq_id(self) -> SeqId:
        self._num_sequences += 1
        return SeqId(self._num_sequences)


def _num_pages(held: Items[Held]) -> int:
    return sum(each.num_pages for each in held)


def _order(sequence: Sequence) -> Order:
    return sequence.order


def _rejection(request: Request, error: BadRequest) -> Rejection:
    return Rejection(request.request_id, error.message, error.code, error.param)
