"""Pins, times, priorities, budgets and idle work, as requests ask for them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from kvpaging.base.config import SchedulerConfig
from kvpaging.base.errors import LawBroken
from kvpaging.base.evictions import Evicted
from kvpaging.base.ids import RequestId
from kvpaging.cache.cache_manager import CacheManager
from kvpaging.cache.lower_levels import Held, LevelsFlushed, PagesLoaded, PageStore
from kvpaging.cache.prefix_key import ChainLink
from kvpaging.cache.retention import AS_IT_IS, Retention
from kvpaging.scheduling.events import Abort, Arrival, Event, Flush, Unpin
from kvpaging.scheduling.outputs import FinishReason, Rejection
from kvpaging.scheduling.plan import Sample, StepPlan, StepResult
from kvpaging.scheduling.request import Request, SamplingParams
from kvpaging.scheduling.scheduler import Scheduler
from kvpaging.scheduling.sequence import PRIORITY_S

SIZE = 2


class Levels:
    """Below the device everything is taken, and `held` pages of each prefix are there."""

    names = ("host",)
    store_at_uses = (1,)
    wants_evicted = True
    held = 0

    def num_storable(self) -> int:
        return 99

    def probe(self, links: Sequence[ChainLink]) -> tuple[Held, ...]:
        return (Held("host", min(self.held, len(links))),) if self.held else ()

    def evicted(self, keys: object) -> dict[str, list[Evicted | None]]:
        return {}


class Bench:
    """A scheduler whose model says 7 to everything."""

    def __init__(
        self,
        num_pages: int = 12,
        *,
        max_pinned: int = 4,
        levels: Levels | None = None,
        budget: int = 32,
        max_num_seqs: int = 4,
    ):
        config = SchedulerConfig(
            num_pages=num_pages,
            page_size=SIZE,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=100,
            max_num_waiting=50,
            max_pinned_pages=max_pinned,
        )
        self.cache = CacheManager(num_pages, SIZE, levels=levels, max_pinned_pages=max_pinned)
        self.scheduler = Scheduler(config, self.cache, vocab_size=100)
        self.now = 0.0
        self.cached: dict[str, int] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.rejections: list[Rejection] = []
        self.stores: list[PageStore] = []

    def step(self, *events: Event) -> StepPlan:
        plan = self.scheduler.schedule(events, self.now)
        samples = tuple((Sample(7),) * len(entry.sample_for) for entry in plan.scheduled)
        outputs = self.scheduler.apply(plan, StepResult(plan.step_id, samples), self.now)
        self.stores += plan.stores
        self.rejections += outputs.rejections
        for output in outputs.outputs:
            self.cached[output.request_id] = output.num_cached_tokens
            if output.finished is not None:
                self.reasons[output.request_id] = output.finished.reason
        return plan

    def run(self, *events: Event) -> None:
        self.step(*events)
        for _ in range(200):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("livelock")

    def fill(self, first: int = 30) -> None:
        """So many other prompts that every page that may go is evicted."""
        for i in range(6):
            self.run(order(f"fill {self.now} {first} {i}", [first + i] * 15, 1))

    def hit(self, prompt: list[int]) -> int:
        """Tokens of the prompt that would be found now."""
        self.cache.advance(self.now)
        chain = self.cache.chain(b"")
        chain.extend(prompt)
        return len(self.cache.match(chain, len(prompt))) * SIZE


def order(
    name: str,
    prompt: list[int],
    max_new: int = 1,
    *,
    retention: Retention = AS_IT_IS,
    priority: int = 0,
    tenant: str = "",
    tenant_pages: int | None = None,
    is_idle: bool = False,
) -> Arrival:
    sampling = SamplingParams(max_new_tokens=max_new, seed=0)
    return Arrival(
        Request(
            RequestId(name),
            tuple(prompt),
            sampling,
            priority=priority,
            tenant=tenant,
            tenant_pages=tenant_pages,
            retention=retention,
            is_idle=is_idle,
        )
    )


def test_what_is_not_to_be_stored_is_free_at_the_end_and_goes_nowhere() -> None:
    bench = Bench(levels=Levels())
    bench.run(order("seen", [1] * 4, 1))
    num_free = bench.cache.allocator.num_free
    bench.stores.clear()
    bench.run(order("secret", [1] * 4 + [2] * 5, 3, retention=Retention(store=False)))
    assert bench.cached["secret"] == 4, "it may find what others left"
    assert bench.cache.allocator.num_free == num_free
    assert not bench.stores
    assert bench.hit([1] * 4 + [2] * 5) == 4


def test_pages_leave_when_their_time_is_over_and_use_renews_it() -> None:
    bench = Bench(levels=Levels())
    short = Retention(ttl_s=10.0)
    bench.run(order("a", [1] * 9, 1, retention=short))
    assert not bench.stores, "what has an end goes to no lower level"
    bench.now = 8.0
    bench.run(order("b", [1] * 9, 1, retention=short))
    assert bench.cached["b"] == 8
    bench.now = 17.9
    assert bench.hit([1] * 9) == 8
    bench.now = 18.0
    assert bench.hit([1] * 9) == 0
    assert bench.cache.allocator.num_cached == 0


def test_what_has_an_end_is_not_stored_when_it_is_evicted() -> None:
    bench = Bench(levels=Levels())
    bench.run(order("short", [1] * 9, 1, retention=Retention(ttl_s=10.0)))
    bench.run(order("long", [2] * 9, 1))
    bench.fill()
    assert bench.hit([1] * 9) == bench.hit([2] * 9) == 0
    evicted = {store.link.tokens for store in bench.stores if store.is_eviction}
    assert b"\2\0\0\0" * SIZE in evicted
    assert b"\1\0\0\0" * SIZE not in evicted


def test_who_sets_no_end_keeps_what_he_used_and_nothing_after_it() -> None:
    bench = Bench()
    bench.run(order("a", [1] * 9, 1, retention=Retention(ttl_s=10.0)))
    bench.run(order("b", [1] * 4 + [2] * 3, 1))
    bench.now = 10.0
    assert bench.hit([1] * 9) == 4


def test_a_page_in_use_outlives_its_time() -> None:
    bench = Bench()
    bench.run(order("a", [1] * 9, 1, retention=Retention(ttl_s=1.0)))
    bench.step(order("b", [1] * 9, 4, retention=Retention(store=False)))
    bench.now = 5.0
    bench.run()
    assert bench.cached["b"] == 8
    assert bench.cache.allocator.num_free == 12


def test_pages_of_a_lower_priority_go_first() -> None:
    bench = Bench()
    bench.run(order("high", [1] * 5, 1, retention=Retention(priority=1)))
    bench.run(order("low", [2] * 5, 1, retention=Retention(priority=-1)))
    bench.run(order("plain", [3] * 5, 1))
    bench.run(order("more", [4] * 16, 1))  # 8 pages: 6 are free, 2 of 6 cached ones must go
    assert [bench.hit([i] * 5) for i in (1, 2, 3)] == [4, 0, 4]
    bench.fill()
    assert [bench.hit([i] * 5) for i in (1, 2, 3)] == [4, 0, 0]


def test_a_pinned_prefix_is_found_whatever_came_between_until_it_is_given_up() -> None:
    bench = Bench()
    bench.run(order("pin", [1] * 7, 3, retention=Retention(pin=True)))
    bench.fill()
    assert bench.hit([1] * 7) == 6
    assert bench.cache.allocator.num_held == 3, "the prompt's pages, not the output's"
    bench.run(Unpin(RequestId("pin")))
    bench.run(Unpin(RequestId("pin")))
    assert bench.cache.allocator.num_held == 0
    assert bench.hit([1] * 7) == 6, "it is cached like any other"
    bench.fill(50)
    assert bench.hit([1] * 7) == 0


def test_a_pin_with_an_end() -> None:
    bench = Bench()
    bench.run(order("pin", [1] * 7, 1, retention=Retention(pin=True, ttl_s=10.0)))
    (state,) = bench.cache.pins.states(4.0)
    assert (state.name, state.num_pages, state.is_kept, state.ends_in_s) == ("pin", 3, True, 6.0)
    bench.now = 9.0
    bench.fill()
    assert bench.hit([1] * 7) == 6
    bench.now = 10.0
    bench.run(order("y", [2] * 3, 1))
    assert not bench.cache.pins.num_pages
    assert bench.hit([1] * 7) == 0


def test_pins_have_a_bound_that_the_answer_names() -> None:
    bench = Bench(max_pinned=4)
    pin = Retention(pin=True)
    bench.run(order("a", [1] * 6, 1, retention=pin))
    bench.run(order("b", [1] * 6 + [2] * 2, 1, retention=pin))  # one page more than `a`
    bench.run(order("c", [3] * 2, 1, retention=pin))
    (refused,) = bench.rejections
    assert (refused.request_id, refused.code) == ("c", "pin_limit_exceeded")
    assert "of the 4 that all requests together may pin fewer are left" in refused.message
    bench.run(Unpin(RequestId("a")))  # `b` needs its pages
    assert bench.cache.pins.num_pages == 4
    bench.run(Unpin(RequestId("b")))
    assert bench.cache.pins.num_pages == 0


def test_a_tenants_pins_are_within_its_budget() -> None:
    bench = Bench(max_pinned=9)
    pin = Retention(pin=True)
    bench.run(order("a", [1] * 6, 1, retention=pin, tenant="t", tenant_pages=4))
    bench.run(order("b", [2] * 6, 1, retention=pin, tenant="t", tenant_pages=4))
    assert "3 of the 4 that this tenant may pin" in bench.rejections[0].message
    bench.run(order("c", [2] * 6, 1, retention=pin, tenant="u", tenant_pages=4))
    assert bench.cache.pins.num_pages == 6


def test_pinning_again_renews_and_does_not_add() -> None:
    bench = Bench()
    bench.run(order("a", [1] * 7, 1, retention=Retention(pin=True, ttl_s=5.0)))
    bench.now = 3.0
    bench.run(order("b", [1] * 7, 1, retention=Retention(pin=True, ttl_s=5.0)))
    assert [pin.name for pin in bench.cache.pins.states(3.0)] == ["b"]
    bench.now = 7.0
    bench.run(order("c", [2] * 3, 1))
    assert bench.cache.pins.num_owned == 3
    bench.now = 8.0
    bench.run(order("d", [2] * 3, 1))
    assert bench.cache.pins.num_owned == 0


def test_twins_computed_side_by_side_are_pinned_once() -> None:
    bench = Bench(max_pinned=3)
    pin = Retention(pin=True)
    bench.run(order("a", [1] * 7, 2, retention=pin), order("b", [1] * 7, 4, retention=pin))
    assert not bench.rejections
    assert bench.cache.pins.num_owned == bench.cache.allocator.num_held == 3
    assert bench.hit([1] * 7) == 6


def test_a_pin_that_was_never_computed_is_forgotten() -> None:
    bench = Bench(budget=4)
    bench.step(order("a", [1] * 8, 1, retention=Retention(pin=True)))
    assert bench.cache.pins.num_pages == 4
    bench.run(Abort(RequestId("a")))
    assert bench.cache.pins.num_pages == 0
    assert bench.cache.allocator.num_held == 0


def test_pins_are_released_when_an_abort_meets_a_load() -> None:
    levels = Levels()
    levels.held = 3
    bench = Bench(levels=levels)
    plan = bench.step(order("a", [1] * 7, 1, retention=Retention(pin=True)))
    (load,) = plan.loads
    bench.step(Abort(RequestId("a")))
    assert bench.cache.pins.num_pages == 0
    assert bench.cache.allocator.num_held == 3, "the load still writes to them"
    bench.run(PagesLoaded(load.seq_id, 3, 0.01))
    assert bench.cache.allocator.num_held == 0
    levels.held = 0
    assert bench.hit([1] * 7) == 6


def test_a_pinned_prefix_that_comes_from_below() -> None:
    levels = Levels()
    levels.held = 3
    bench = Bench(levels=levels)
    (load,) = bench.step(order("a", [1] * 7, 1, retention=Retention(pin=True))).loads
    levels.held = 0
    bench.run(PagesLoaded(load.seq_id, 3, 0.01))
    assert bench.cached["a"] == 6
    bench.fill()
    assert bench.hit([1] * 7) == 6


def test_a_pin_and_the_preemption_of_who_made_it() -> None:
    bench = Bench(10, max_pinned=2)
    bench.step(order("a", [1] * 4, 12), order("b", [2] * 4, 12, retention=Retention(pin=True)))
    bench.run()
    assert bench.scheduler.counters.preemptions > 0
    assert set(bench.reasons.values()) == {FinishReason.LENGTH}
    assert bench.cache.allocator.num_held == bench.cache.pins.num_owned == 2


@pytest.mark.parametrize(
    ("retention", "says"),
    [
        (Retention(ttl_s=0.0), "cache.ttl_s must be above 0"),
        (Retention(ttl_s=float("nan")), "cache.ttl_s must be above 0"),
        (Retention(priority=101), "cache.priority must be in -100..100, not 101"),
        (Retention(store=False, pin=True), "cache.store false"),
        (Retention(store=False, ttl_s=1.0), "cache.store false"),
    ],
)
def test_what_says_nothing_is_refused(retention: Retention, says: str) -> None:
    bench = Bench()
    bench.run(order("a", [1] * 7, 1, retention=retention))
    assert says in bench.rejections[0].message


@pytest.mark.parametrize(
    ("num_pages", "why"),
    [
        (50, "the model's length of 100 tokens takes 50 of the 50 KV pages"),
        (60, "--max-pinned-ratio leaves them no page"),
    ],
)
def test_where_pins_may_hold_nothing_each_is_refused_with_the_reason(
    num_pages: int, why: str
) -> None:
    bench = Bench(num_pages, max_pinned=0)
    bench.run(order("a", [1] * 7, 1, retention=Retention(pin=True)))
    [refused] = bench.rejections
    assert (refused.code, refused.param) == ("pin_limit_exceeded", "cache")
    assert "pins may hold 0 KV pages" in refused.message
    assert why in refused.message
    bench.run(order("b", [1] * 7, 1))
    assert bench.reasons == {"b": FinishReason.LENGTH}


def test_a_tenant_over_its_budget_loses_its_own_pages_first() -> None:
    bench = Bench(20)
    bench.run(order("other", [9] * 7, 1, tenant="u"))
    for i in range(1, 5):
        bench.run(order(f"{i}", [i] * 7, 1, tenant="t", tenant_pages=8))
    assert bench.cache.allocator.num_free > 0, "nobody else needs pages"
    assert bench.cache.budgets.num_pages() == {"t": 7}
    assert [bench.hit([i] * 7) for i in (1, 2, 3, 4)] == [0, 2, 6, 6], "tails first"
    assert bench.hit([9] * 7) == 6


def test_what_can_never_fit_a_tenants_budget_is_refused_with_the_numbers() -> None:
    bench = Bench()
    bench.run(order("a", [1] * 7, 4, tenant="t", tenant_pages=4))
    assert bench.rejections[0].code == "tenant_budget_exceeded"
    assert "5 KV pages and this tenant may have 4" in bench.rejections[0].message


def test_nothing_is_loaded_while_a_level_is_emptied() -> None:
    levels = Levels()
    levels.held = 3
    bench = Bench(levels=levels)
    plan = bench.step(Flush(1, "host"), order("a", [1] * 7, 1))
    assert plan.flushes
    assert not plan.loads, "it would be found after the flush was answered"
    assert not bench.step(order("b", [2] * 7, 1)).loads
    bench.run(LevelsFlushed(1, {"host": 3}))
    assert set(bench.reasons) == {"a", "b"}
    assert bench.step(order("c", [3] * 7, 1)).loads


def test_a_level_that_is_not_here_is_emptied_without_a_trace() -> None:
    levels = Levels()
    levels.num_storable = lambda: 0  # type: ignore[method-assign]
    bench = Bench(levels=levels)
    bench.step(order("a", [1] * 5, 1))
    assert bench.cache.has_stores
    bench.step(Flush(1, "nonsense"))
    assert bench.cache.has_stores


def test_emptying_one_level_takes_from_the_others_nothing_that_was_to_go_there() -> None:
    levels = Levels()
    levels.num_storable = lambda: 0  # type: ignore[method-assign]
    levels.names = ("host", "disk")  # type: ignore[assignment]
    bench = Bench(levels=levels)
    bench.step(order("a", [1] * 5, 1))
    plan = bench.step(Flush(1, "disk"))
    assert len(plan.stores) == 2, "before the flush, in the same plan"
    assert plan.flushes[0].levels == ("disk",)
    bench.step(LevelsFlushed(1, {"disk": 2}))
    bench.step(order("b", [2] * 5, 1))
    plan = bench.step(Flush(2, None))
    assert not plan.stores
    assert not bench.cache.has_stores


def test_what_asks_for_nothing_special_costs_nothing_whichever_process_it_came_from() -> None:
    bench = Bench()
    asked = []
    bench.cache.retained.ask = lambda *args, **more: asked.append(args)  # type: ignore[method-assign]
    sent = msgspec.msgpack.encode(order("a", [1] * 7, 3).request)
    bench.run(Arrival(msgspec.msgpack.decode(sent, type=Request)))
    assert not asked
    bench.run(order("b", [2] * 7, 3, retention=Retention(priority=1)))
    assert asked


def test_idle_work_runs_alone_and_gives_way_at_once() -> None:
    bench = Bench(budget=4)
    bench.step(order("real", [1] * 3, 3), order("idle", [2] * 8, 1, is_idle=True))
    for _ in range(2):
        assert bench.scheduler.num_waiting == 1
        bench.step()
    assert "real" in bench.reasons
    plan = bench.step()
    assert [(entry.start, entry.num_new_tokens) for entry in plan.scheduled] == [(0, 4)]
    plan = bench.step(order("next", [3] * 3, 2))
    assert [added.num_prompt_tokens for added in plan.added] == [3], "it ran on"
    assert bench.scheduler.counters.preemptions == 1
    bench.run()
    assert bench.reasons["idle"] is FinishReason.LENGTH


def test_idle_work_with_a_plan_in_flight_is_planned_no_further() -> None:
    bench = Bench(budget=4)
    first = bench.scheduler.schedule([order("idle", [2] * 12, 1, is_idle=True)], 0.0)
    second = bench.scheduler.schedule([order("real", [3] * 3, 1)], 0.0)
    assert [entry.seq_id for entry in first.scheduled] == [1]
    assert [entry.seq_id for entry in second.scheduled] == [2]


def test_a_low_priority_is_overtaken_for_a_while_and_not_for_ever() -> None:
    bench = Bench(max_num_seqs=1)
    bench.step(order("running", [1], 2))
    bench.step(order("low", [2], 1))
    bench.now = PRIORITY_S - 1
    bench.step(order("early", [3], 1, priority=1))
    bench.now = PRIORITY_S + 1
    bench.step(order("late", [4], 1, priority=1))
    bench.run()
    assert list(bench.reasons) == ["running", "early", "low", "late"]


def test_a_leak_is_told_and_not_waited_for() -> None:
    bench = Bench()
    bench.cache.allocator.take(8)
    with pytest.raises(LawBroken, match="8 pages are held, and no sequence and no pin owns them"):
        bench.step(order("a", [1] * 12, 1))


def test_a_leak_while_somebody_is_blocked_is_told_too() -> None:
    bench = Bench()
    bench.step(order("a", [1] * 8, 3))
    bench.step(order("b", [2] * 20, 1))
    assert bench.scheduler.num_waiting == 1
    bench.cache.allocator.take(bench.cache.num_available)  # nothing comes back any more
    with pytest.raises(LawBroken, match="pages are held"):
        bench.run()
