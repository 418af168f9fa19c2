"""What one plan holds; whole runs are in tests/kvpaging/engine/test_engine_digest.py."""

from __future__ import annotations

from collections.abc import Sized

import msgspec
import pytest

from kvpaging.base.config import SchedulerConfig
from kvpaging.base.errors import ConfigError, LawBroken
from kvpaging.base.evictions import Evicted
from kvpaging.base.ids import PageKey, RequestId, SeqId
from kvpaging.cache import prefix_key
from kvpaging.cache.cache_manager import CacheManager
from kvpaging.cache.load_costs import RETRY_S
from kvpaging.cache.lower_levels import Held, LevelLoad, PagesLoaded
from kvpaging.scheduling import scheduler as scheduler_module
from kvpaging.scheduling.events import Abort, Arrival, Finish
from kvpaging.scheduling.outputs import FinishReason, StepOutputs
from kvpaging.scheduling.plan import Sample, StepPlan, StepResult
from kvpaging.scheduling.request import Request, SamplingParams
from kvpaging.scheduling.scheduler import Scheduler
from kvpaging.scheduling.sequence import MOVES, SeqState, Sequence


def make(
    num_pages: int = 64, page_size: int = 4, max_num_seqs: int = 4, budget: int = 8
) -> Scheduler:
    config = SchedulerConfig(
        num_pages=num_pages,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=200,
        max_num_waiting=100,
    )
    return Scheduler(
        config, CacheManager(num_pages, page_size), vocab_size=100, eos_token_ids=frozenset({0})
    )


def arrival(name: str, num_prompt: int, max_new: int = 50, **sampling: object) -> Arrival:
    parameters = SamplingParams(max_new_tokens=max_new, seed=0, **sampling)  # type: ignore[arg-type]
    first = sum(name.encode()) % 90 + 1
    return Arrival(Request(RequestId(name), (first,) * num_prompt, parameters))


def results(plan: StepPlan, token_id: int = 7) -> StepResult:
    samples = tuple(tuple(Sample(token_id) for _ in e.sample_for) for e in plan.scheduled)
    return StepResult(plan.step_id, samples)


def step(scheduler: Scheduler, *events: object, token_id: int = 7) -> tuple[StepPlan, StepOutputs]:
    plan = scheduler.schedule(events, 0.0)  # type: ignore[arg-type]
    return plan, scheduler.apply(plan, results(plan, token_id), 0.0)


def work(plan: StepPlan) -> list[tuple[int, int, int]]:
    return [(e.seq_id, e.start, e.num_new_tokens) for e in plan.scheduled]


def test_a_long_prompt_takes_what_decoding_leaves() -> None:
    scheduler = make()
    step(scheduler, arrival("a", 2))
    plan, _ = step(scheduler, arrival("b", 20))
    assert work(plan) == [(1, 2, 1), (2, 0, 7)]
    plan, _ = step(scheduler, arrival("c", 3))
    assert work(plan) == [(1, 3, 1), (2, 7, 7)]
    plan, _ = step(scheduler)
    assert work(plan) == [(1, 4, 1), (2, 14, 6), (3, 0, 1)]


def test_a_short_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        make(max_num_seqs=9, budget=8)


def test_a_row_is_added_once_and_removed_once() -> None:
    scheduler = make()
    first, _ = step(scheduler, arrival("a", 9, max_new=3))
    assert [added.seq_id for added in first.added] == [1]
    assert first.added[0].page_ids == (1, 2)
    assert first.scheduled[0].new_page_ids == ()
    second, _ = step(scheduler)
    assert second.added == ()
    assert second.scheduled[0].new_page_ids == (3,)
    step(scheduler)
    _, outputs = step(scheduler)
    assert outputs.outputs[-1].finished is not None
    assert scheduler.has_work, "the row is still to be removed"
    last, _ = step(scheduler)
    assert last.removed == (1,)
    assert not scheduler.has_work


def test_a_prompt_waits_until_there_is_room_for_it_beside_the_running_ones() -> None:
    scheduler = make(num_pages=7, budget=8)
    step(scheduler, arrival("a", 20, max_new=5))
    step(scheduler, arrival("b", 8, max_new=1))
    plan, _ = step(scheduler)
    assert work(plan) == [(1, 16, 4)], "b's two pages would leave none for a's next tokens"
    placed = 0
    while scheduler.has_work:
        plan, _ = step(scheduler)
        placed += sum(added.seq_id == 2 for added in plan.added)
    assert placed == 1
    assert scheduler.counters.preemptions == 0


def test_ends_are_decided_by_token_length_and_minimum() -> None:
    scheduler = make()
    _, outputs = step(scheduler, arrival("eos", 1), token_id=0)
    end = outputs.outputs[0].finished
    assert end is not None
    assert (end.reason, end.stop_token_id) == (FinishReason.STOP, 0)
    _, outputs = step(scheduler, arrival("ignores", 1, max_new=1, ignore_eos=True), token_id=0)
    end = outputs.outputs[0].finished
    assert end is not None
    assert (end.reason, end.stop_token_id) == (FinishReason.LENGTH, None)
    _, outputs = step(scheduler, arrival("stops", 1, stop_token_ids=(5,)), token_id=5)
    end = outputs.outputs[0].finished
    assert end is not None
    assert (end.reason, end.stop_token_id) == (FinishReason.STOP, 5)
    _, outputs = step(scheduler, arrival("min", 1, min_new_tokens=2), token_id=0)
    assert outputs.outputs[0].finished is None


def test_finish_and_abort_tell_their_reason_and_are_idempotent() -> None:
    scheduler = make()
    step(scheduler, arrival("a", 1), arrival("b", 1))
    finish, abort = Finish(RequestId("a"), 0, 1), Abort(RequestId("b"))
    _, outputs = step(scheduler, finish, finish, abort, abort, Abort(RequestId("nobody")))
    ends = {o.request_id: o.finished.reason for o in outputs.outputs if o.finished}
    assert ends == {"a": FinishReason.STOP, "b": FinishReason.ABORT}
    assert len(outputs.outputs) == 2
    assert scheduler.cache.allocator.num_held == 0


def test_a_second_request_with_the_same_id_is_refused() -> None:
    scheduler = make()
    _, outputs = step(scheduler, arrival("a", 1), arrival("a", 1))
    assert [r.code for r in outputs.rejections] == ["duplicate_request"]


def test_results_of_another_plan_are_refused() -> None:
    scheduler = make()
    plan = scheduler.schedule([arrival("a", 1)], 0.0)
    with pytest.raises(LawBroken):
        scheduler.apply(plan, StepResult(plan.step_id, ()), 0.0)


def test_two_plans_pages_stay_until_the_last_that_reads_them_is_applied() -> None:
    scheduler = make()
    pages = scheduler.cache.allocator
    one = scheduler.schedule([arrival("a", 6)], 0.0)
    two = scheduler.schedule([], 0.0)
    assert work(two) == [(1, 6, 1)]
    three = scheduler.schedule([Abort(RequestId("a"))], 0.0)
    assert pages.num_held == 2
    scheduler.apply(one, results(one), 0.0)
    assert pages.num_held == 2
    scheduler.apply(two, results(two), 0.0)
    assert pages.num_held == 0
    scheduler.apply(three, results(three), 0.0)
    four, _ = step(scheduler)
    assert four.removed == (1,)


def test_a_step_samples_no_more_than_there_are_sequences() -> None:
    scheduler = make(max_num_seqs=4, budget=64, num_pages=200)
    requests = [Arrival(msgspec.structs.replace(arrival(f"{i}", 3).request, n=3)) for i in range(4)]
    most, forks = 0, 0
    plan, _ = step(scheduler, *requests)
    for _ in range(200):
        drawn = sum(len(entry.sample_for) for entry in plan.scheduled)
        forks += sum(len(entry.sample_for) == 3 for entry in plan.scheduled)
        most = max(most, drawn)
        plan, _ = step(scheduler)
    assert forks == 4
    assert most <= 4 + 3


def test_requests_that_left_while_they_waited_hold_no_memory() -> None:
    scheduler = make(max_num_seqs=1)
    step(scheduler, arrival("runs", 1))
    for i in range(500):
        step(scheduler, arrival(f"{i}", 5))
        step(scheduler, Abort(RequestId(f"{i}")))
    assert scheduler.num_waiting == 0
    assert len(scheduler._waiting._heap) < 100


class HashCounter:
    """Counts the page keys that are made, where a step may hash `bound` tokens."""

    def __init__(self, patch: pytest.MonkeyPatch, bound: int) -> None:
        self.count = 0
        self._page_key = prefix_key.page_key
        patch.setattr(prefix_key, "page_key", self.page_key)
        patch.setattr(scheduler_module, "MAX_HASHED_TOKENS", bound)

    def page_key(self, parent: PageKey, namespace: bytes, tokens: bytes) -> PageKey:
        self.count += 1
        return self._page_key(parent, namespace, tokens)

    def step(self, scheduler: Scheduler, *events: Arrival) -> tuple[StepPlan, int]:
        """A step, and the pages that were hashed to plan it."""
        before = self.count
        plan = scheduler.schedule(events, 0.0)
        hashed = self.count - before
        scheduler.apply(plan, results(plan), 0.0)
        return plan, hashed


def test_a_long_prompt_is_hashed_in_pieces_while_others_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = make(num_pages=200)
    counter = HashCounter(monkeypatch, bound=20)
    step(scheduler, arrival("runs", 1, max_new=90))
    long, short = arrival("long", 150), arrival("short", 12)
    steps = [counter.step(scheduler, long, short)]
    chain = scheduler._sequences[SeqId(2)].chain
    while len(steps) < 40:
        steps.append(counter.step(scheduler))
    added = [[row.seq_id for row in plan.added] for plan, _ in steps]
    assert added[:8] == [[]] * 7 + [[2]], "37 pages, 5 a step"
    assert [row for rows in added for row in rows] == [2, 3], "one overtook the other"
    assert all(plan.scheduled[0].seq_id == 1 for plan, _ in steps), "the running one was held up"
    assert max(hashed for _, hashed in steps) == 5
    assert sum(hashed for _, hashed in steps) == 37 + 3
    whole = scheduler.cache.chain(b"")
    whole.extend(long.request.prompt_token_ids)
    assert chain.links[:37] == whole.links


@pytest.mark.parametrize(("page_size", "num_pages"), [(1, 20), (4, 5), (16, 1), (32, 1)])
def test_what_a_step_hashes_is_bounded_in_tokens(
    monkeypatch: pytest.MonkeyPatch, page_size: int, num_pages: int
) -> None:
    scheduler = make(num_pages=400, page_size=page_size)
    counter = HashCounter(monkeypatch, bound=20)
    step(scheduler, arrival("runs", 1, max_new=90))
    assert counter.step(scheduler, arrival("long", 150))[1] == num_pages


def test_what_comes_first_is_hashed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make(num_pages=200)
    counter = HashCounter(monkeypatch, bound=20)
    step(scheduler, arrival("runs", 1, max_new=90))
    counter.step(scheduler, arrival("long", 150))
    urgent = msgspec.structs.replace(arrival("urgent", 6).request, priority=1)
    plan, hashed = counter.step(scheduler, Arrival(urgent))
    assert [row.seq_id for row in plan.added] == [3]
    assert hashed == 5, "the urgent one's page, and four of the long one's"


def test_a_long_prompt_that_holds_up_nobody_is_hashed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = make(num_pages=200)
    counter = HashCounter(monkeypatch, bound=20)
    plan, hashed = counter.step(scheduler, arrival("long", 150), arrival("other", 150))
    assert [row.seq_id for row in plan.added] == [1]
    assert hashed <= 37 + 5


def test_of_those_that_left_unhashed_nothing_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make(num_pages=200)
    counter = HashCounter(monkeypatch, bound=20)
    step(scheduler, arrival("runs", 1, max_new=90))
    counter.step(scheduler, arrival("long", 150), arrival("longer", 160))
    step(scheduler, Abort(RequestId("long")), Abort(RequestId("longer")))
    assert counter.step(scheduler)[1] == 0
    assert not scheduler._unhashed


class Everything:
    """Lower levels that believe to have every page."""

    names = ("all",)
    store_at_uses = ()
    wants_evicted = False

    def num_storable(self) -> int:
        return 0

    def probe(self, links: Sized) -> tuple[Held, ...]:
        return (Held("all", len(links)),) if len(links) else ()

    def evicted(self, keys: object) -> dict[str, list[Evicted | None]]:
        return {}


def test_loads_take_no_place_beyond_the_limit_and_cost_no_earlier_one_its_pages() -> None:
    scheduler = make(num_pages=12, max_num_seqs=2, budget=8)
    scheduler.cache._levels = Everything()
    # Nothing to find for it: its only page is not full.
    step(scheduler, arrival("first", 3, max_new=40))
    plan, _ = step(scheduler, *(arrival(name, 30, max_new=2) for name in ("x", "y", "z")))
    assert len(plan.loads) == 1
    for _ in range(30):
        plan, _ = step(scheduler)
        assert not plan.loads
        assert plan.removed == (), "preempted for the sake of a load"
    assert scheduler.num_loading == 1
    plan, _ = step(scheduler, PagesLoaded(SeqId(2), 0, 0.1))
    assert plan.scheduled


def test_those_behind_load_before_their_turn_into_pages_that_nobody_before_them_needs() -> None:
    scheduler = make(num_pages=32, max_num_seqs=1, budget=8)
    scheduler.cache._levels = Everything()
    step(scheduler, arrival("first", 3, max_new=12))
    plan, _ = step(scheduler, *(arrival(name, 33, max_new=2) for name in "xyzw"))
    # 31 pages are left: one for the first to grow into, 9 for each of x, y and z.
    assert [len(load.page_ids) for load in plan.loads] == [8, 8, 8]
    assert (scheduler.num_running, scheduler.num_loading, scheduler.num_waiting) == (1, 3, 1)
    loaded = [PagesLoaded(load.seq_id, 8, 0.1) for load in plan.loads[::-1]]
    plan, _ = step(scheduler, *loaded)
    assert not plan.loads, "what is in place must not be pushed out by those behind"
    started: list[tuple[int, int]] = []
    while scheduler.has_work:
        plan, _ = step(
            scheduler, *(PagesLoaded(load.seq_id, len(load.page_ids), 0.1) for load in plan.loads)
        )
        started += [(added.seq_id, plan.scheduled[-1].start) for added in plan.added]
    assert started[:3] == [(2, 32), (3, 32), (4, 32)], "in their order, each from its cached end"


def test_a_level_without_hits_is_asked_again_at_a_bounded_rate() -> None:
    """A remote level that answers late; after a minute another server has filled it."""
    scheduler = make(num_pages=64, budget=64)
    scheduler.cache._levels = Everything()
    now, asked, found = 0.0, [], []
    loaded: list[PagesLoaded] = []
    for number in range(1000):
        now += 0.1
        if number % 2 == 0:
            loaded.append(arrival(f"{number}", 33 + number % 7, max_new=1))  # type: ignore[arg-type]
        plan = scheduler.schedule(loaded, now)
        loaded = []
        for load in plan.loads:
            asked.append(now)
            num_pages = len(load.page_ids) if now > 60 else 0
            elapsed_s = 0.01 if num_pages else 0.2
            given = (LevelLoad("all", len(load.page_ids), num_pages, elapsed_s),)
            loaded.append(PagesLoaded(load.seq_id, num_pages, elapsed_s, given))
            if num_pages:
                found.append(now)
        computed = msgspec.structs.replace(results(plan), elapsed_s=plan.num_new_tokens * 0.05)
        scheduler.apply(plan, computed, now)
    late = [at for at in asked if 10 < at <= 60]
    assert 8 <= len(late) <= 11, "every 5 s"
    assert found[0] <= 60 + RETRY_S + 0.3
    assert len(found) > 50, "and is believed again"


def test_the_table_of_states_is_complete() -> None:
    assert set(MOVES) == set(SeqState)
    sequence = Sequence(1, arrival("a", 1).request, 0, None, arrival_index=1, arrival_s=0.0)  # type: ignore[arg-type]
    sequence.move(SeqState.FINISHED)
    with pytest.raises(LawBroken):
        sequence.move(SeqState.RUNNING)
