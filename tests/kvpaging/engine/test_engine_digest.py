"""Whole engines on the digest model: what comes out must not depend on who else is there."""

from __future__ import annotations

import random
from collections import deque

import msgspec
import pytest
from digest_model import (
    DigestExecutor,
    DigestLevels,
    RunningDigest,
    digest_config,
    expected_scores,
    expected_tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from retentions import RETENTIONS

from kvpaging.base.config import EngineConfig
from kvpaging.base.errors import BadRequest
from kvpaging.base.ids import RequestId
from kvpaging.cache import cache_manager
from kvpaging.cache.cache_manager import CacheManager
from kvpaging.cache.prefix_key import SharedPrefix
from kvpaging.engine.engine import Engine
from kvpaging.scheduling.events import Abort, Arrival, Event, Finish, Flush, Unpin
from kvpaging.scheduling.outputs import FinishReason, StepOutputs
from kvpaging.scheduling.plan import Sample, StepPlan, StepResult
from kvpaging.scheduling.request import Request, SamplingParams
from kvpaging.scheduling.scheduler import Scheduler


def make_engine(config: EngineConfig) -> tuple[Engine, DigestExecutor]:
    executor = DigestExecutor(config.scheduler.num_pages, config.scheduler.page_size)
    return Engine(config, executor), executor


def request(name: str, prompt: list[int], max_new: int, **kwargs: object) -> Request:
    n = kwargs.pop("n", 1)
    priority = kwargs.pop("priority", 0)
    namespace = kwargs.pop("namespace", b"")
    shared = kwargs.pop("shared", None)
    fields = ("tenant", "tenant_pages", "retention", "is_idle")
    terms = {field: kwargs.pop(field) for field in fields if field in kwargs}
    sampling = SamplingParams(max_new_tokens=max_new, seed=kwargs.pop("seed", 0), **kwargs)
    return Request(
        RequestId(name), tuple(prompt), sampling, n, priority, namespace, shared, **terms
    )


class Collector:
    """What each output of each request got."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.scores: dict[tuple[str, int], list[Sample]] = {}
        self.reasons: dict[tuple[str, int], FinishReason] = {}
        self.rejected: dict[str, str] = {}
        self.outputs: list = []
        self.flushed: list[int] = []

    def take(self, outputs: StepOutputs) -> None:
        self.flushed += [flushed.query_id for flushed in outputs.flushed]
        for rejection in outputs.rejections:
            self.rejected[rejection.request_id] = rejection.code
        for output in outputs.outputs:
            self.outputs.append(output)
            key = (output.request_id, output.output_index)
            assert key not in self.reasons, "an output after the end"
            assert not (output.prompt_samples and self.tokens.get(key)), "a score after a token"
            self.scores.setdefault(key, []).extend(output.prompt_samples)
            self.tokens.setdefault(key, []).extend(s.token_id for s in output.samples)
            if output.finished:
                self.reasons[key] = output.finished.reason


class TwoPlans:
    """An engine loop that holds two plans: schedules k + 1 before k is applied."""

    def __init__(self, config: EngineConfig, depth: int, levels: DigestLevels | None = None):
        self.cache = CacheManager(
            config.scheduler.num_pages,
            config.scheduler.page_size,
            levels=levels,
            max_pinned_pages=config.scheduler.max_pinned_pages,
        )
        self.scheduler = Scheduler(
            config.scheduler,
            self.cache,
            vocab_size=config.vocab_size,
            eos_token_ids=frozenset(config.eos_token_ids),
        )
        self.executor = DigestExecutor(
            config.scheduler.num_pages, config.scheduler.page_size, levels
        )
        self.depth = depth
        self.in_flight: deque = deque()
        self.now = 0.0

    def step(self, events: list[Event]) -> StepOutputs:
        self.now += 1
        plan = self.scheduler.schedule([*events, *self.executor.completions()], self.now)
        config = self.scheduler.config
        assert plan.num_new_tokens <= config.max_num_batched_tokens
        assert self.scheduler.num_running <= config.max_num_seqs
        if not self.in_flight and not self.scheduler.num_loading and self.scheduler.num_waiting:
            assert plan.scheduled, "work waits, nothing is in flight, and the plan is empty"
        # The device runs plans in order; what it sampled is seen one step later.
        self.in_flight.append((plan, self.executor.run(plan)))
        if len(self.in_flight) < self.depth:
            return StepOutputs()
        return self.scheduler.apply(*self.in_flight.popleft(), self.now)

    def drain(self) -> list[StepOutputs]:
        return [
            self.scheduler.apply(*self.in_flight.popleft(), self.now) for _ in tuple(self.in_flight)
        ]


@pytest.mark.parametrize("has_levels", [False, True], ids=["device", "levels"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_random_arrivals_aborts_and_tiny_pools(
    seed: int, depth: int, has_levels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(f"{seed} {depth} {has_levels}")
    levels = None
    if has_levels:
        uses, wants_evicted = rng.choice([((), True), ((1,), False), ((2,), True), ((1, 3), True)])
        levels = DigestLevels(rng, store_at_uses=uses, wants_evicted=wants_evicted)
    page_size = rng.choice([1, 2, 3, 4])
    config = digest_config(
        num_pages=rng.randint(6, 24),
        page_size=page_size,
        max_num_seqs=rng.randint(1, 6),
        max_num_batched_tokens=rng.randint(6, 20),
        max_model_len=24,
        eos_token_ids=(0, 1, 2) if rng.random() < 0.5 else (),
        max_pinned_ratio=rng.choice([0.0, 0.3, 1.0]),
    )
    monkeypatch.setattr(cache_manager, "MAX_EMPTIED", rng.choice([1, 3, 1000]))
    loop, seen = TwoPlans(config, depth, levels), Collector()
    accepted: dict[str, Request] = {}
    aborted: set[str] = set()
    finished_by_text: set[tuple[str, int]] = set()
    num_flushes = 0
    num_steps, arrivals = 0, rng.randint(20, 40)
    while arrivals or loop.scheduler.has_work or loop.in_flight:
        num_steps += 1
        assert num_steps < 5000, "livelock"
        events: list[Event] = []
        while arrivals and rng.random() < 0.5:
            arrivals -= 1
            name = f"r{arrivals}"
            prompt = [rng.randint(1, 2) for _ in range(rng.randint(1, 14))]
            n = rng.choice([1, 1, 1, min(3, config.scheduler.max_num_seqs)])
            tenant = rng.choice(["free", "bound"])
            accepted[name] = request(
                name,
                prompt,
                rng.randint(1, 8),
                n=n,
                seed=rng.randint(0, 3),
                priority=rng.choice([0, 0, 1]),
                namespace=rng.choice([b"a", b"b"]),
                shared=rng.choice([None, SharedPrefix(b"all", min(8, len(prompt)))]),
                prompt_logprobs=rng.choice([None, None, 0, 2]),
                retention=rng.choice(RETENTIONS),
                tenant=tenant,
                tenant_pages=6 if tenant == "bound" else None,
                is_idle=rng.random() < 0.2,
            )
            events.append(Arrival(accepted[name]))
        if accepted and rng.random() < 0.05:
            events.append(Unpin(RequestId(rng.choice(list(accepted)))))
        if rng.random() < 0.05:
            num_flushes += 1
            events.append(Flush(num_flushes, rng.choice([None, "device", "digest"])))
        live = [name for name in accepted if name not in aborted]
        if live and rng.random() < 0.1:
            name = rng.choice(live)
            aborted.add(name)
            events += [Abort(RequestId(name)), Abort(RequestId(name))]
        if live and rng.random() < 0.05:
            key = (rng.choice(live), 0)
            finished_by_text.add(key)
            events.append(Finish(RequestId(key[0]), 0, 1))
        seen.take(loop.step(events))
        if not loop.scheduler.has_work:
            for outputs in loop.drain():
                seen.take(outputs)
    assert sorted(seen.flushed) == list(range(1, num_flushes + 1))
    stop = frozenset(config.eos_token_ids)
    for name, order in accepted.items():
        if name in seen.rejected:
            codes = ["pool_exceeded", "tenant_budget_exceeded", "pin_limit_exceeded"]
            if order.retention.pin and len(order.prompt_token_ids) < config.scheduler.page_size:
                codes.append("invalid_value")  # a pin that would keep nothing
            assert seen.rejected[name] in codes
            continue
        for k in range(order.n):
            want = expected_tokens(
                order.prompt_token_ids, order.sampling.seed, k, order.sampling.max_new_tokens, stop
            )
            got = seen.tokens.get((name, k), [])
            scores, num_top = seen.scores.get((name, k), []), order.sampling.prompt_logprobs
            want_scores = []
            if k == 0 and num_top is not None:
                want_scores = expected_scores(order.prompt_token_ids, num_top)
            assert scores == want_scores[: len(scores)]
            assert not got or scores == want_scores
            reason = seen.reasons.get((name, k))
            cut_short = name in aborted or (name, k) in finished_by_text
            assert reason is not None, (name, k)
            if reason in (FinishReason.ABORT, FinishReason.STOP) and cut_short:
                assert got == want[: len(got)]
            else:
                assert got == want
                ended = want[-1] in stop
                assert reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
    pages, pins = loop.cache.allocator, loop.cache.pins
    assert pages.num_held == pins.num_owned == pins.num_pages <= pins.max_pages
    for pin in pins.states(loop.now):
        loop.cache.drop_pin(pin.name)
    assert pages.num_held == 0
    assert not loop.cache.leases
    assert pages.num_free + pages.num_cached == pages.num_pages
    assert not loop.executor.rows


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
def test_the_random_test_exercises_what_it_claims(ahead: bool) -> None:
    """Preemptions, hits, chunks and copies happen in a run like those above."""
    config = digest_config(num_pages=10, page_size=2, max_num_seqs=5, max_num_batched_tokens=8)
    engine, executor = make_engine(msgspec.structs.replace(config, async_scheduling=ahead))
    seen = Collector()
    for i in range(12):
        seen.take(
            engine.step([Arrival(request(f"{i}", [1] * (5 + i % 3), 9, n=1 + i % 2, seed=i))])
        )
    while engine.has_work:
        seen.take(engine.step())
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_recomputed_tokens > 0
    assert stats.prefix_hit_tokens > 0
    assert stats.num_evicted_pages > 0
    assert executor.num_copies > 0
    assert executor.num_chunks > 0
    assert len(seen.reasons) == 18


class OutOfOrderError(Exception):
    """A plan ran before the one before it."""


class HoldingExecutor(DigestExecutor):
    """Notes how many plans are held whenever one is made, and that they run in order."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        super().__init__(num_pages, page_size)
        self.num_held: list[int] = []

    def submit(self, plan: StepPlan) -> RunningDigest:
        self.num_held.append(plan.step_id - len(self.plans))
        return super().submit(plan)

    def run(self, plan: StepPlan) -> StepResult:
        if plan.step_id != len(self.plans) + 1:
            raise OutOfOrderError(plan.step_id)
        return super().run(plan)


@pytest.mark.parametrize("seed", range(8))
def test_planning_ahead_changes_no_token_and_leaves_nothing_behind(seed: int) -> None:
    """Stops are seen late: what the row sampled beyond its end is never shown."""
    rng = random.Random(seed)
    prompts = [[rng.randint(1, 3) for _ in range(rng.randint(1, 12))] for _ in range(12)]
    sampling = SamplingParams(max_new_tokens=9, seed=0)
    got = []
    for ahead in (False, True):
        config = digest_config(num_pages=12, page_size=2, eos_token_ids=tuple(range(15)))
        config = msgspec.structs.replace(config, async_scheduling=ahead)
        executor = HoldingExecutor(12, 2)
        engine = Engine(config, executor)
        answers = engine.generate(prompts, sampling, n=1 + seed % 2)
        assert max(executor.num_held) == 1 + ahead
        stats = engine.stats()
        assert stats.num_held_pages == stats.num_running == 0
        assert not executor.rows
        num_sampled = sum(len(e.sample_for) for plan in executor.plans for e in plan.scheduled)
        answered = [[completion.token_ids for completion in one] for one in answers]
        num_shown = sum(len(tokens) for one in answered for tokens in one)
        assert (num_sampled > num_shown) is ahead, "no row went on beyond its end"
        assert {c.finished.reason for one in answers for c in one} == {
            FinishReason.STOP,
            FinishReason.LENGTH,
        }
        got.append(answered)
    assert got[0] == got[1]


def test_an_abort_while_two_plans_are_held_gives_all_pages_back() -> None:
    config = digest_config(num_pages=12, page_size=2, eos_token_ids=())
    executor = HoldingExecutor(12, 2)
    engine = Engine(msgspec.structs.replace(config, async_scheduling=True), executor)
    seen = Collector()
    seen.take(engine.step([Arrival(request("a", [1] * 5, 15)), Arrival(request("b", [2] * 5, 6))]))
    for _ in range(3):
        seen.take(engine.step())
    seen.take(engine.step([Abort(RequestId("a"))]))
    assert seen.reasons[("a", 0)] is FinishReason.ABORT
    num_held = engine.stats().num_held_pages
    while engine.has_work:
        seen.take(engine.step())
    assert num_held > engine.stats().num_held_pages == 0
    assert seen.tokens[("b", 0)] == expected_tokens([2] * 5, 0, 0, 6, frozenset())
    assert seen.tokens[("a", 0)] == expected_tokens([1] * 5, 0, 0, 15, frozenset())[:4]
    assert executor.num_held[0:2] == [1, 2]


def test_scores_of_the_prompt_cost_hits_only_while_they_are_to_be_sent() -> None:
    """Alone, with a warm cache, and preempted by another's needs: the same scores, each once."""
    prompts = [[1, 2] * 6, [1, 2] * 6, [3, 4] * 6]
    plain = SamplingParams(max_new_tokens=8, seed=0)
    scored = SamplingParams(max_new_tokens=8, seed=0, prompt_logprobs=2)
    config = digest_config(num_pages=8, max_num_batched_tokens=5, eos_token_ids=())
    engine, executor = make_engine(config)
    engine.generate(prompts[:1], plain)
    [[one]] = engine.generate(prompts[:1], scored)
    assert one.num_cached_tokens == 0
    assert one.prompt_samples == expected_scores(prompts[0], 2)
    [[warm]] = engine.generate(prompts[:1], plain)
    assert (warm.num_cached_tokens, warm.prompt_samples) == (8, [])

    for completions, prompt in zip(engine.generate(prompts, scored, n=2), prompts, strict=True):
        assert completions[0].prompt_samples == expected_scores(prompt, 2)
        assert completions[1].prompt_samples == []
        assert [c.token_ids for c in completions] == [
            expected_tokens(prompt, 0, k, 8, frozenset()) for k in range(2)
        ]
    assert engine.stats().num_preemptions > 0
    after = [entry for plan in executor.plans for entry in plan.scheduled if entry.start > 11]
    assert all(entry.prompt_logprobs is None for entry in after)


def test_a_preempted_prompt_is_scored_on_from_where_it_was() -> None:
    """A token a step for each: after eight steps the first takes the other's pages."""
    config = digest_config(
        num_pages=8, page_size=2, max_num_batched_tokens=2, max_num_seqs=2, eos_token_ids=()
    )
    loop, seen = TwoPlans(config, 1), Collector()
    first = request("first", [5], 12)
    late = request("late", [6, 7, 8] * 4, 1, prompt_logprobs=1)
    seen.take(loop.step([Arrival(first), Arrival(late)]))
    while loop.scheduler.has_work:
        seen.take(loop.step([]))
    ends = {o.request_id: o.finished for o in seen.outputs if o.finished}
    assert ends["late"].num_preemptions == 1
    assert ends["late"].num_recomputed_tokens > 0
    assert seen.scores[("late", 0)] == expected_scores(late.prompt_token_ids, 1)


def test_evicted_pages_come_back_from_below_and_an_abort_meets_a_load() -> None:
    levels = DigestLevels(random.Random(1), wants_evicted=True)
    loop = TwoPlans(digest_config(num_pages=8, page_size=2, eos_token_ids=()), 1, levels)
    seen = Collector()
    prompts = [[1, 2] * 4 + [k] for k in (3, 4)] + [[5, 6] * 5]

    def run(name: str, prompt: list[int]) -> None:
        seen.take(loop.step([Arrival(request(name, prompt, 2))]))
        for _ in range(40):
            levels.pages |= kept  # these do not forget
            seen.take(loop.step([]))
            kept.update(levels.pages)

    kept: dict[bytes, tuple[bytes, list[int]]] = {}
    for k, prompt in enumerate(prompts * 2):
        run(f"{k}", prompt)
        assert seen.tokens[(f"{k}", 0)] == expected_tokens(prompt, 0, 0, 2, frozenset())
    assert levels.num_loaded > 0
    # An abort while pages are on their way: they stay reserved until the load is answered.
    run("other", [7, 8] * 5)
    levels.pages |= kept
    loop.step([Arrival(request("gone", prompts[0], 2))])
    assert loop.scheduler.num_loading == 1
    levels.pending = [(3, load) for _, load in levels.pending]
    seen.take(loop.step([Abort(RequestId("gone"))]))
    assert seen.reasons[("gone", 0)] is FinishReason.ABORT
    assert loop.cache.allocator.num_held > 0
    assert loop.scheduler.has_work
    for _ in range(5):
        loop.step([])
    assert loop.cache.allocator.num_held == 0
    assert not loop.scheduler.has_work


def test_n_outputs_share_the_prompts_full_pages_and_copy_the_tail() -> None:
    engine, executor = make_engine(digest_config(eos_token_ids=()))
    engine.step([Arrival(request("a", [1] * 10, 3, n=3))])  # 2 full pages and half a page
    assert engine.stats().num_held_pages == 2 + 3
    seen = Collector()
    while engine.has_work:
        seen.take(engine.step())
    assert executor.num_copies == 2
    assert engine.stats().num_held_pages == 0


def test_the_next_turn_finds_pages_that_generated_tokens_filled() -> None:
    engine, _ = make_engine(digest_config(eos_token_ids=(), num_pages=32))
    prompt = [3] * 6
    [[first]] = engine.generate([prompt], SamplingParams(max_new_tokens=8, seed=0))
    assert first.num_cached_tokens == 0
    next_turn = [*prompt, *first.token_ids, 5, 5]
    [[second]] = engine.generate([next_turn], SamplingParams(max_new_tokens=1, seed=0))
    assert second.num_cached_tokens == 12  # 13 tokens were computed: three full pages of 4


def test_a_full_hit_still_computes_the_last_token() -> None:
    engine, executor = make_engine(digest_config())
    sampling = SamplingParams(max_new_tokens=1, seed=0)
    [[cold]] = engine.generate([[1] * 8], sampling)
    [[warm]] = engine.generate([[1] * 8], sampling)
    assert warm.num_cached_tokens == 4
    assert warm.token_ids == cold.token_ids
    assert [plan.num_new_tokens for plan in executor.plans if plan.scheduled] == [8, 4]


def test_namespaces_never_meet() -> None:
    engine, _ = make_engine(digest_config(eos_token_ids=()))
    seen = Collector()
    for name, namespace in (("a", b"x"), ("b", b"y"), ("c", b"x")):
        seen.take(engine.step([Arrival(request(name, [1] * 9, 1, namespace=namespace))]))
        while engine.has_work:
            seen.take(engine.step())
    assert [o.num_cached_tokens for o in seen.outputs] == [0, 0, 8]


def test_what_follows_a_shared_beginning_is_found_by_its_own_namespace_alone() -> None:
    engine, _ = make_engine(digest_config(eos_token_ids=()))
    seen = Collector()
    shared = SharedPrefix(b"all", 6)  # one page of 4, and a half that is private
    for name, namespace in (("a", b"x"), ("b", b"y"), ("c", b"x")):
        order = request(name, [1] * 13, 1, namespace=namespace, shared=shared)
        seen.take(engine.step([Arrival(order)]))
        while engine.has_work:
            seen.take(engine.step())
    alone = request("d", [1] * 13, 1, namespace=b"y")
    seen.take(engine.step([Arrival(alone)]))
    while engine.has_work:
        seen.take(engine.step())
    assert [o.num_cached_tokens for o in seen.outputs] == [0, 4, 12, 0]


def test_switched_off_prefix_cache_finds_nothing_and_says_the_same() -> None:
    sampling = SamplingParams(max_new_tokens=6, seed=0)
    answers = []
    for prefix_cache in (True, False):
        engine, _ = make_engine(digest_config(prefix_cache=prefix_cache))
        first = engine.generate([[1, 2] * 6], sampling)
        [[again]] = engine.generate([[1, 2] * 6], sampling)
        assert (again.num_cached_tokens > 0) == prefix_cache
        answers.append((first[0][0].token_ids, again.token_ids))
    assert answers[0] == answers[1]
    assert answers[0][0] == answers[0][1]


def test_higher_priority_first_and_first_come_first_served_within() -> None:
    engine, _ = make_engine(digest_config(max_num_seqs=1, eos_token_ids=()))
    order = [("low", -1), ("a", 0), ("b", 0), ("high", 5)]
    seen = Collector()
    seen.take(
        engine.step(
            [
                Arrival(request(name, [1], 2, priority=p, seed=i))
                for i, (name, p) in enumerate(order)
            ]
        )
    )
    while engine.has_work:
        seen.take(engine.step())
    assert [o.request_id for o in seen.outputs if o.finished] == ["high", "a", "b", "low"]


def test_a_preempted_sequence_goes_before_newer_ones() -> None:
    engine, executor = make_engine(
        digest_config(num_pages=6, page_size=2, max_num_seqs=3, eos_token_ids=())
    )
    engine.step([Arrival(request(name, [1, 2], 6, seed=i)) for i, name in enumerate("abc")])
    engine.step([Arrival(request("d", [1], 2))])
    while engine.has_work:
        engine.step()
    placed = [
        (added.token_ids[0], len(added.token_ids)) for p in executor.plans for added in p.added
    ]
    assert engine.stats().num_preemptions > 0
    assert placed.index((1, 1)) == len(placed) - 1, "the newest was placed before a preempted one"


def test_what_can_never_fit_is_rejected_with_the_numbers() -> None:
    engine, _ = make_engine(digest_config(num_pages=4, page_size=4, max_model_len=64))
    with pytest.raises(BadRequest, match="5 KV pages and the pool has 4"):
        engine.generate([[1] * 10], SamplingParams(max_new_tokens=9, seed=0))
    # 16 slots hold 17 tokens: the last one is sampled and never computed
    [[completion]] = engine.generate([[1] * 10], SamplingParams(max_new_tokens=7, seed=0))
    assert completion.finished is not None


def test_a_full_queue_refuses_and_says_so() -> None:
    engine, _ = make_engine(digest_config(max_num_seqs=1, max_num_waiting=2))
    seen = Collector()
    seen.take(engine.step([Arrival(request(f"{i}", [1], 2)) for i in range(5)]))
    assert list(seen.rejected.values()) == ["overloaded"] * 3


def test_logits_that_are_no_numbers_fail_one_request_for_all_its_outputs() -> None:
    engine, executor = make_engine(digest_config(eos_token_ids=()))
    executor.failing.add((7,) * 9)
    seen = Collector()
    seen.take(
        engine.step([Arrival(request("bad", [7] * 9, 4, n=2)), Arrival(request("good", [1], 4))])
    )
    while engine.has_work:
        seen.take(engine.step())
    assert seen.reasons[("bad", 0)] is FinishReason.ERROR
    assert seen.reasons[("bad", 1)] is FinishReason.ERROR
    assert seen.tokens[("good", 0)] == expected_tokens([1], 0, 0, 4, frozenset())
    executor.failing.clear()
    [[again]] = engine.generate([[7] * 9], SamplingParams(max_new_tokens=1, seed=0))
    assert again.num_cached_tokens == 0, "values that are no numbers must not be found again"


def test_who_shared_a_failed_prompt_leaves_nothing_of_it_behind() -> None:
    engine, executor = make_engine(
        digest_config(num_pages=32, max_num_batched_tokens=8, eos_token_ids=())
    )
    prompt = [7] * 20
    executor.failing.add(tuple(prompt))
    seen = Collector()
    seen.take(engine.step([Arrival(request("a", prompt, 2))]))
    seen.take(engine.step([Arrival(request("b", prompt, 2))]))  # finds a's first pages
    while engine.has_work:
        seen.take(engine.step())
    assert seen.reasons == {("a", 0): FinishReason.ERROR, ("b", 0): FinishReason.ERROR}
    assert all(o.num_cached_tokens > 0 for o in seen.outputs if o.request_id == "b")
    executor.failing.clear()
    [[after]] = engine.generate([prompt], SamplingParams(max_new_tokens=2, seed=0))
    assert after.num_cached_tokens == 0
    assert after.token_ids == expected_tokens(prompt, 0, 0, 2, frozenset())


def test_only_pages_that_somebody_sampled_well_from_go_down() -> None:
    levels = DigestLevels(random.Random(1), store_at_uses=(1,), wants_evicted=False)
    config = digest_config(num_pages=32, max_num_batched_tokens=8, eos_token_ids=())
    loop, seen = TwoPlans(config, 1, levels), Collector()
    prompt = [7] * 20
    loop.executor.failing.add(tuple(prompt))
    seen.take(loop.step([Arrival(request("bad", prompt, 2))]))
    while loop.scheduler.has_work:
        seen.take(loop.step([]))
    assert not levels.pages
    seen.take(loop.step([Arrival(request("good", [8] * 20, 2))]))
    assert not levels.pages, "nobody knows yet what they are worth"
    stored = 0
    while loop.scheduler.has_work:
        seen.take(loop.step([]))
        stored = max(stored, len(levels.pages))
    assert stored > 0


def test_more_prompts_than_may_wait_are_fed_as_there_is_room() -> None:
    engine, _ = make_engine(digest_config(max_num_seqs=2, max_num_waiting=2, eos_token_ids=()))
    done = engine.generate(
        [[1] * (k % 5 + 1) for k in range(9)], SamplingParams(max_new_tokens=2, seed=0)
    )
    assert all(outputs[0].finished for outputs in done)


def test_waste_stays_below_one_page_a_sequence() -> None:
    engine, _ = make_engine(digest_config(num_pages=40, max_num_seqs=4, eos_token_ids=()))
    events: list[Event] = [Arrival(request(f"{i}", [1] * (3 + i), 20, seed=i)) for i in range(4)]
    while events or engine.has_work:
        engine.step(events)
        events = []
        stats = engine.stats()
        assert stats.num_wasted_slots <= stats.num_running * (4 - 1)


def test_pages_shows_each_page_once() -> None:
    engine, _ = make_engine(digest_config(eos_token_ids=()))
    engine.generate([[1] * 9], SamplingParams(max_new_tokens=1, seed=0))
    engine.step([Arrival(request("a", [1] * 10, 3))])
    picture = engine.pages()
    assert [p.page_id for p in picture] == list(range(1, 17))
    held = [p for p in picture if p.state == "held"]
    assert sorted(p.num_tokens for p in held) == [2, 4, 4]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 2), min_size=1, max_size=20),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(4, 30),
)
def test_chunking_and_page_size_change_nothing(
    prompt: list[int], max_new: int, page_size: int, budget: int
) -> None:
    engine, _ = make_engine(
        digest_config(num_pages=40, page_size=page_size, max_num_batched_tokens=budget)
    )
    [[completion]] = engine.generate([prompt], SamplingParams(max_new_tokens=max_new, seed=3))
    assert completion.token_ids == expected_tokens(prompt, 3, 0, max_new, frozenset({0}))


def test_scores_that_are_no_numbers_fail_the_request_where_they_are_found() -> None:
    config = digest_config(max_num_batched_tokens=4, eos_token_ids=())
    engine, executor = make_engine(config)
    executor.failing.add((7,) * 11)
    seen = Collector()
    bad = request("bad", [7] * 11, 4, n=2, prompt_logprobs=0)
    seen.take(engine.step([Arrival(bad), Arrival(request("good", [1], 4))]))
    assert seen.reasons == {("bad", k): FinishReason.ERROR for k in range(2)}
    while engine.has_work:
        seen.take(engine.step())
    assert seen.tokens[("good", 0)] == expected_tokens([1], 0, 0, 4, frozenset())
    assert seen.scores[("bad", 0)] == []
