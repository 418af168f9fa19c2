"""Explanations are true: scenes with known reasons, and laws that hold in random runs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import msgspec
import pytest
from digest_model import DigestExecutor, DigestLevels, digest, digest_config

from kvpaging.base.evictions import Evicted, EvictionCause
from kvpaging.base.ids import RequestId
from kvpaging.cache import cache_manager
from kvpaging.cache.explanation import CacheExplanation, LevelMatch, MissedRun, MissReason
from kvpaging.cache.lower_levels import Held, LevelLoad, PagesLoaded
from kvpaging.cache.prefix_key import ChainLink, root_key
from kvpaging.engine.engine import Engine
from kvpaging.scheduling.events import Abort, Arrival, Event, Flush
from kvpaging.scheduling.outputs import Finished
from kvpaging.scheduling.plan import StepPlan
from kvpaging.scheduling.request import Request, SamplingParams

SIZE = 4


class Scene:
    """An engine on the digest model with a clock that is set by hand."""

    def __init__(
        self,
        num_pages: int = 16,
        *,
        levels: DigestLevels | None = None,
        identity: bytes = b"",
        **config: bool,
    ):
        self.now = 100.0
        self.num_requests = 0
        settings = msgspec.structs.replace(
            digest_config(num_pages, SIZE, **config), numerics_identity=identity
        )
        self.executor = DigestExecutor(num_pages, SIZE, levels)
        self.engine = Engine(settings, self.executor, clock=lambda: self.now)

    def order(
        self, prompt: Sequence[int], namespace: bytes = b"", *, n: int = 1, **sampling: int
    ) -> Request:
        self.num_requests += 1
        params = SamplingParams(max_new_tokens=sampling.pop("new", 1), seed=0, **sampling)
        return Request(
            RequestId(str(self.num_requests)),
            tuple(prompt),
            params,
            n,
            namespace=namespace,
            explain=True,
        )

    def run(self, *orders: Request) -> list[Finished]:
        events: list[Event] = [Arrival(order) for order in orders]
        ended: dict[str, Finished] = {}
        while events or self.engine.has_work:
            for output in self.engine.step(events).outputs:
                if output.finished is not None:
                    ended[output.request_id] = output.finished
            events = []
        return [ended[order.request_id] for order in orders]

    def ask(self, prompt: Sequence[int], namespace: bytes = b"", **sampling: int) -> Told:
        (finished,) = self.run(self.order(prompt, namespace, **sampling))
        assert finished.explanation is not None
        return Told(finished.explanation)


class Told:
    def __init__(self, explanation: CacheExplanation):
        check(explanation)
        self.all = explanation
        self.levels = tuple(
            msgspec.structs.replace(level, missed=()) for level in explanation.levels
        )
        self.missed_by_level = {level.level: level.missed for level in explanation.levels}
        self.missed = explanation.missed
        self.reasons = [(run.reason, run.first_token, run.num_tokens) for run in self.missed]


def check(told: CacheExplanation) -> None:
    """What every explanation must be."""
    at = told.num_cached_tokens
    for run in told.missed:
        assert run.first_token == at
        assert run.num_tokens > 0
        assert (run.reason is MissReason.EVICTED) == (run.cause is not None)
        at += run.num_tokens
    assert at == told.num_tokens, "cached and missed tokens are not the prompt"
    assert sum(level.num_pages for level in told.levels) * told.page_size == told.num_cached_tokens
    for level in told.levels:
        first, end = level.first_mismatch, 0
        assert (first is None) == (not level.missed)
        for run in level.missed:
            assert run.first_token >= end
            assert run.num_tokens > 0
            assert (run.reason is MissReason.EVICTED) == (run.level == level.level)
            end = run.first_token + run.num_tokens
        if first is not None:
            assert level.missed[0].first_token == first * told.page_size
    for faster, slower in zip(told.levels, told.levels[1:], strict=False):
        if slower.num_pages or slower.num_left:
            assert faster.first_mismatch is not None
        if slower.first_mismatch is not None:
            assert faster.first_mismatch is not None
            assert faster.first_mismatch <= slower.first_mismatch


PROMPT = list(range(1, 11))


def test_a_prompt_that_nobody_sent_was_never_seen() -> None:
    told = Scene().ask(PROMPT)
    assert told.levels == (LevelMatch("device", 0, 0, 0),)
    assert told.reasons == [(MissReason.NEVER_SEEN, 0, 8), (MissReason.BELOW_PAGE, 8, 2)]
    assert told.all.load is None


def test_the_same_again_is_found_but_for_the_last_token() -> None:
    scene = Scene()
    scene.ask(PROMPT)
    told = scene.ask(PROMPT)
    assert told.levels == (LevelMatch("device", 2, 0, None),)
    assert told.reasons == [(MissReason.BELOW_PAGE, 8, 2)]
    assert scene.ask(PROMPT[:8]).reasons == [(MissReason.LAST_TOKEN, 4, 4)]


def test_where_two_prompts_part_is_the_first_mismatch() -> None:
    scene = Scene()
    scene.ask(PROMPT)
    told = scene.ask([*PROMPT[:5], 90, *PROMPT[6:]])
    assert told.levels == (LevelMatch("device", 1, 0, 1),)
    assert told.reasons == [(MissReason.NEVER_SEEN, 4, 4), (MissReason.BELOW_PAGE, 8, 2)]


def test_evicted_pages_say_when_and_what_for() -> None:
    scene = Scene(num_pages=4)
    scene.ask(PROMPT)
    scene.now = 130.0
    scene.ask([7] * 13)
    scene.now = 142.5
    told = scene.ask(PROMPT)
    assert told.missed[0] == MissedRun(MissReason.EVICTED, 0, 8, EvictionCause.ROOM, 12.5, "device")
    assert told.levels[0].first_mismatch == 0


def test_nothing_is_told_of_other_tenants() -> None:
    scene = Scene(num_pages=4)
    told = [scene.ask(PROMPT, b"one").all]
    told.append(scene.ask(PROMPT, b"two").all)  # it is there, of another
    scene.ask([7] * 13, b"one")
    told.append(scene.ask(PROMPT, b"three").all)  # it was evicted, of another
    assert told[0] == told[1] == told[2]


def test_pages_hold_no_logits() -> None:
    scene = Scene()
    scene.ask(PROMPT)
    told = scene.ask(PROMPT, prompt_logprobs=1)
    assert told.reasons == [(MissReason.SCORED, 0, 8), (MissReason.BELOW_PAGE, 8, 2)]


def test_a_cache_that_is_off() -> None:
    scene = Scene(prefix_cache=False)
    scene.ask(PROMPT)
    told = scene.ask(PROMPT)
    assert told.levels == ()
    assert told.reasons == [(MissReason.DISABLED, 0, 8), (MissReason.DISABLED, 8, 2)]


def test_who_does_not_ask_is_not_told() -> None:
    scene = Scene()
    order = msgspec.structs.replace(scene.order(PROMPT), explain=False)
    (finished,) = scene.run(order)
    assert finished.explanation is None


def test_what_a_preemption_cost() -> None:
    scene = Scene(num_pages=6)
    ended = scene.run(*(scene.order([i] * 7, new=9) for i in (1, 2)))
    assert [end.num_preemptions for end in ended] == [0, 1]
    assert ended[0].recomputed == ()
    ((first, count),) = [(r.first_token, r.num_tokens) for r in ended[1].recomputed]
    assert count == ended[1].num_recomputed_tokens > 0
    assert first % SIZE == 0
    assert ended[1].explanation == msgspec.structs.replace(ended[0].explanation)


def test_a_twin_that_comes_back_by_a_load_has_the_explanation_of_its_prompt() -> None:
    levels = DigestLevels(random.Random(0), store_at_uses=(1,), wants_evicted=True, forgets=False)
    scene = Scene(num_pages=10, levels=levels)
    ended: dict[int, Finished] = {}
    events: list[Event] = [Arrival(scene.order([*range(1, 18)], n=4, new=16))]
    while events or scene.engine.has_work:
        for output in scene.engine.step(events).outputs:
            if output.finished is not None:
                ended[output.output_index] = output.finished
        events = []
    assert levels.num_loaded > 0
    assert len(ended) == 4
    explanations = {finished.explanation for finished in ended.values()}
    assert len(explanations) == 1
    (told,) = explanations
    assert told is not None
    check(told)
    assert told.load is None, "what was loaded later is not of the look-up"


class Shelf(DigestLevels):
    """Two levels that have what they are told, and deliver as much of it as they are told."""

    def __init__(
        self,
        held: tuple[Held, ...],
        num_delivered: int = 99,
        names: tuple[str, ...] = ("fast", "slow"),
    ):
        super().__init__(random.Random(0), store_at_uses=(1,), wants_evicted=False)
        self.names = names
        self.held = held
        self.num_delivered = num_delivered
        self.elapsed_s = 0.5

    def probe(self, links: Sequence[ChainLink]) -> tuple[Held, ...]:
        return self.held if links else ()

    def carry_out(self, plan: StepPlan, slots: list[int], size: int) -> None:
        for load in plan.loads:
            self.pending.append((0, load))

    def completions(self, slots: list[int], size: int) -> tuple[PagesLoaded, ...]:
        due, self.pending = self.pending, []
        ended = []
        for _, load in due:
            left = count = min(self.num_delivered, len(load.links))
            for page_id, link in zip(load.page_ids[:count], load.links, strict=False):
                tokens = [link.tokens[i] for i in range(0, 4 * size, 4)]
                slots[page_id * size : (page_id + 1) * size] = tokens
            loads = []
            for level, num_pages in self.held:
                came = min(left, num_pages)
                loads.append(LevelLoad(level, num_pages, came, self.elapsed_s))
                left -= came
            ended.append(PagesLoaded(load.seq_id, count, self.elapsed_s, tuple(loads)))
        return tuple(ended)


LONG = list(range(1, 23))


def test_each_level_says_what_it_gave_and_where_it_ended() -> None:
    scene = Scene(levels=Shelf((Held("fast", 1), Held("slow", 2))))
    scene.ask(LONG[:6])
    told = scene.ask(LONG)
    assert told.levels == (
        LevelMatch("device", 1, 0, 1),
        LevelMatch("fast", 1, 0, 2),
        LevelMatch("slow", 2, 0, 4),
    )
    assert told.reasons == [(MissReason.NEVER_SEEN, 16, 4), (MissReason.BELOW_PAGE, 20, 2)]
    load = told.all.load
    assert load is not None
    assert (load.num_below, load.num_asked, load.num_loaded, load.elapsed_s) == (3, 3, 3, 0.5)


def test_what_did_not_come_is_said() -> None:
    scene = Scene(levels=Shelf((Held("fast", 1), Held("slow", 2)), num_delivered=2))
    told = scene.ask(LONG)
    assert told.levels == (
        LevelMatch("device", 0, 0, 0),
        LevelMatch("fast", 1, 0, 1),
        LevelMatch("slow", 1, 0, 2),
    )
    assert told.reasons[0] == (MissReason.NOT_DELIVERED, 8, 4)


def test_each_level_says_why_it_had_not_what_it_was_asked_for() -> None:
    shelf = Shelf((Held("fast", 1), Held("slow", 1)))
    scene = Scene(levels=shelf)
    chain = scene.engine._cache.chain(b"")
    scene.engine._cache.extend(chain, LONG)
    keys = [link.key for link in chain.links]
    shelf.gone["fast"] = {
        keys[1]: Evicted(9.0, EvictionCause.ROOM),
        keys[3]: Evicted(8.0, EvictionCause.ROOM),
    }
    shelf.gone["slow"] = {
        keys[3]: Evicted(7.0, EvictionCause.CORRUPT),
        keys[4]: Evicted(6.0, EvictionCause.ROOM),
    }
    scene.ask(LONG[:6])
    shelf.held = (Held("slow", 1),)
    told = scene.ask(LONG)
    never, room = MissReason.NEVER_SEEN, EvictionCause.ROOM
    assert told.missed_by_level == {
        "device": (MissedRun(never, 4, 16),),
        "fast": (
            MissedRun(MissReason.EVICTED, 4, 4, room, 9.0, "fast"),
            MissedRun(never, 8, 4),
            MissedRun(MissReason.EVICTED, 12, 4, room, 8.0, "fast"),
            MissedRun(never, 16, 4),
        ),
        "slow": (
            MissedRun(never, 8, 4),
            MissedRun(MissReason.EVICTED, 12, 4, EvictionCause.CORRUPT, 7.0, "slow"),
            MissedRun(MissReason.EVICTED, 16, 4, room, 6.0, "slow"),
        ),
    }
    assert told.missed == (  # the level that each page left last
        MissedRun(never, 8, 4),
        MissedRun(MissReason.EVICTED, 12, 4, EvictionCause.CORRUPT, 7.0, "slow"),
        MissedRun(MissReason.EVICTED, 16, 4, room, 6.0, "slow"),
        MissedRun(MissReason.BELOW_PAGE, 20, 2),
    )
    missed = scene.engine.cache_stats().missed_pages
    assert (missed["evicted_corrupt"], missed["evicted_room"]) == (1, 1)


def test_a_level_that_only_guesses_does_not_say_that_it_never_had_it() -> None:
    told = Scene(levels=Shelf((Held("remote", 5),), num_delivered=0, names=("remote",))).ask(LONG)
    assert told.missed_by_level["remote"] == (MissedRun(MissReason.NOT_THERE, 0, 20),)


def test_of_a_level_that_only_guesses_a_miss_is_a_miss() -> None:
    scene = Scene(levels=Shelf((Held("remote", 5),), num_delivered=0))
    assert scene.ask(LONG).reasons[0] == (MissReason.NEVER_SEEN, 0, 20)


def guessing(*held: Held, num_pages: int = 16) -> Scene:
    """A remote level that is believed to have what is asked, and is too slow for it."""
    shelf = Shelf(held, num_delivered=0, names=("disk", "remote"))
    scene = Scene(num_pages, levels=shelf)
    costs = scene.engine._scheduler._load_costs
    costs.computed(1000, 0.001)
    costs.begun((Held("remote", 1), Held("disk", 1)), scene.engine._clock())
    costs.loaded((LevelLoad("remote", 1, 0, 1.0), LevelLoad("disk", 1, 1, 1.0)))
    return scene


def test_what_a_level_that_guesses_was_not_asked_for_is_not_there() -> None:
    scene = guessing(Held("remote", 5))
    told = scene.ask(LONG)
    assert told.levels == (
        LevelMatch("device", 0, 0, 0),
        LevelMatch("disk", 0, 0, 0),
        LevelMatch("remote", 0, 0, 0),
    )
    assert told.missed_by_level["remote"] == (MissedRun(MissReason.NOT_ASKED, 0, 20),)
    assert told.reasons[0] == (MissReason.NEVER_SEEN, 0, 20)
    stats = scene.engine.cache_stats()
    assert stats.missed_pages == {"never_seen": 5}
    assert (stats.choices.num_loads, stats.choices.num_refused) == (0, 0)


def test_what_was_evicted_is_told_behind_a_guess() -> None:
    scene = guessing(Held("remote", 2), num_pages=4)
    scene.ask(PROMPT)
    scene.ask([7] * 13)
    room = EvictionCause.ROOM
    assert scene.ask(PROMPT).missed[0] == MissedRun(MissReason.EVICTED, 0, 8, room, 0.0, "device")


def test_a_guess_behind_what_a_level_has_is_none_of_it() -> None:
    scene = guessing(Held("disk", 2), Held("remote", 3))
    told = scene.ask(LONG)
    assert told.levels[1:] == (LevelMatch("disk", 0, 2, 2), LevelMatch("remote", 0, 0, 2))
    assert told.reasons[:2] == [(MissReason.COMPUTING_FASTER, 0, 8), (MissReason.NEVER_SEEN, 8, 12)]
    assert scene.engine.cache_stats().choices.num_refused > 0


def test_without_room_a_guess_is_not_asked() -> None:
    shelf = Shelf((Held("remote", 5),), num_delivered=5, names=("remote",))
    scene = Scene(num_pages=5, levels=shelf)
    scene.engine._scheduler._load = lambda *_: False  # type: ignore[method-assign]
    told = scene.ask(LONG[:18])
    assert told.missed_by_level["remote"] == (MissedRun(MissReason.NOT_ASKED, 0, 16),)
    assert told.reasons[0] == (MissReason.NEVER_SEEN, 0, 16)


def after_other_settings(*prompts: Sequence[int], namespace: bytes = b"a") -> Scene:
    """These were asked under settings that are no more, and their pages are still below."""
    levels = DigestLevels(random.Random(0), store_at_uses=(1,), wants_evicted=False, forgets=False)
    before = Scene(levels=levels)
    for prompt in prompts:
        before.ask(prompt, namespace)
    levels.other_roots = (root_key(b"never written"), before.engine._cache.root)
    return Scene(num_pages=7, levels=levels, identity=b"other weights")


def test_what_is_there_under_other_settings_is_told() -> None:
    scene = after_other_settings(LONG[:14])
    told = scene.ask(LONG, b"a")
    assert told.reasons == [
        (MissReason.OTHER_SETTINGS, 0, 12),
        (MissReason.NEVER_SEEN, 12, 8),
        (MissReason.BELOW_PAGE, 20, 2),
    ]
    never = MissReason.NEVER_SEEN
    assert told.missed_by_level == {
        "device": (MissedRun(never, 0, 20),),
        "digest": (MissedRun(MissReason.OTHER_SETTINGS, 0, 12), MissedRun(never, 12, 8)),
    }
    assert scene.engine.cache_stats().missed_pages == {"never_seen": 5}
    assert scene.ask(LONG, b"a").reasons == [(MissReason.BELOW_PAGE, 20, 2)]


def test_behind_what_is_found_other_settings_are_told_too() -> None:
    scene = after_other_settings(LONG)
    scene.ask(LONG[:10], b"a")
    assert scene.ask(LONG, b"a").reasons[0] == (MissReason.OTHER_SETTINGS, 8, 12)


def test_what_other_tenants_left_under_other_settings_is_not_told() -> None:
    scene = after_other_settings(LONG, namespace=b"a")
    assert scene.ask(LONG, b"b").reasons[0] == (MissReason.NEVER_SEEN, 0, 20)


def test_a_salt_is_another_chain_under_other_settings_too() -> None:
    scene = after_other_settings(LONG, namespace=b"a")
    assert scene.ask(LONG, b"a and its salt").reasons[0] == (MissReason.NEVER_SEEN, 0, 20)


def test_what_was_evicted_was_there_under_these_settings() -> None:
    scene = after_other_settings(PROMPT)
    scene.ask(PROMPT, b"a")
    levels = scene.executor.levels
    assert levels is not None
    own = scene.engine._cache.chain(b"a")
    scene.engine._cache.extend(own, PROMPT)
    scene.ask([7] * 26, b"a")
    for key in own.keys():  # noqa: SIM118 - a chain is no dict
        levels.pages.pop(key)
    assert scene.ask(PROMPT, b"a").reasons[0] == (MissReason.EVICTED, 0, 8)


def test_computing_may_be_faster() -> None:
    shelf = Shelf((Held("fast", 5),), num_delivered=5)
    scene = Scene(num_pages=40, levels=shelf)
    costs = scene.engine._scheduler._load_costs
    costs.computed(1000, 0.001)
    costs.begun((Held("fast", 1),), scene.engine._clock())
    costs.loaded((LevelLoad("fast", 1, 1, 1.0),))
    told = scene.ask(LONG)
    assert told.levels == (
        LevelMatch("device", 0, 0, 0),
        LevelMatch("fast", 0, 5, None),
        LevelMatch("slow", 0, 0, None),
    )
    assert told.reasons[0] == (MissReason.COMPUTING_FASTER, 0, 20)
    load = told.all.load
    assert load is not None
    assert (load.num_below, load.num_asked) == (5, 0)


@pytest.mark.parametrize("seed", range(10))
def test_laws_of_explanations(seed: int) -> None:
    """With levels that forget, preemptions and aborts: each explanation is whole, and none lies
    about what was never there."""
    lot = random.Random(seed)
    levels = DigestLevels(lot, store_at_uses=(1,), wants_evicted=True) if seed % 2 else None
    scene = Scene(num_pages=lot.randint(8, 14), levels=levels)
    prompts = [[lot.randint(1, 3) for _ in range(lot.randint(1, 20))] for _ in range(8)]
    seen: dict[bytes, set[tuple[int, ...]]] = {b"a": set(), b"b": set()}
    orders: dict[str, Request] = {}
    num_evicted = num_preempted = num_ended = num_twins_back = 0
    for _ in range(300):
        scene.now += 1
        events: list[Event] = []
        if lot.random() < 0.4:
            order = scene.order(
                lot.choice(prompts),
                lot.choice([b"a", b"b"]),
                n=lot.choice([1, 1, 3]),
                new=lot.randint(1, 8),
            )
            orders[order.request_id] = order
            events.append(Arrival(order))
        if orders and lot.random() < 0.1:
            events.append(Abort(RequestId(lot.choice(list(orders)))))
        for output in scene.engine.step(events).outputs:
            finished = output.finished
            order = orders[output.request_id]
            if finished is None or finished.explanation is None:
                continue
            num_ended += 1
            told = finished.explanation
            check(told)
            assert told.num_cached_tokens == output.num_cached_tokens
            assert sum(r.num_tokens for r in finished.recomputed) == finished.num_recomputed_tokens
            for run in told.missed:
                if run.reason is MissReason.EVICTED:
                    num_evicted += 1
                    prefix = order.prompt_token_ids[: run.first_token + SIZE]
                    assert prefix in seen[order.namespace], "it was never there"
            num_preempted += bool(finished.recomputed)
            num_twins_back += output.output_index > 0 and finished.num_preemptions > 0
        for row in scene.executor.rows.values():
            for order in orders.values():
                tokens = tuple(row.tokens)
                if tokens[: len(order.prompt_token_ids)] == order.prompt_token_ids:
                    for end in range(1, len(tokens) + 1):
                        seen[order.namespace].add(tokens[:end])
    assert num_ended > 20
    assert num_evicted > 0
    assert num_preempted > 0 or seed != 1
    assert num_twins_back > 0 or seed != 1


def test_what_is_counted_agrees_with_what_is_explained() -> None:
    scene = Scene(num_pages=40, levels=Shelf((Held("fast", 1), Held("slow", 2))))
    told = [scene.ask(LONG[:6]), scene.ask(LONG), scene.ask(LONG)]
    stats = scene.engine.cache_stats()
    hits = {"device": 0, "fast": 0, "slow": 0}
    for one in told:
        for level in one.levels:
            hits[level.level] += level.num_pages
    assert stats.hit_pages == hits
    assert hits["slow"] > 0
    assert stats.queried_tokens == sum(one.all.num_tokens for one in told)
    assert stats.hit_tokens == sum(one.all.num_cached_tokens for one in told)
    assert stats.queried_pages == sum(one.all.num_tokens // SIZE for one in told)
    num_loads = sum(one.all.load is not None and one.all.load.num_asked > 0 for one in told)
    assert [sum(times.counts) for times in stats.load_times.values()] == [num_loads] * 2
    assert sum(stats.pages.values()) == 40
    missed: Counter[str] = Counter()
    for one in told:
        for run in one.missed:
            missed[run.reason] += run.num_tokens // SIZE
    assert stats.missed_pages == +missed


def test_misses_are_counted_without_being_asked_for_and_evictions_by_cause() -> None:
    scene = Scene(num_pages=4)
    for prompt in (PROMPT, [7] * 13, PROMPT):
        scene.run(msgspec.structs.replace(scene.order(prompt), explain=False))
    assert scene.engine.cache_stats().missed_pages == {"never_seen": 5, "evicted_room": 2}


def test_time_saved_is_what_computing_would_have_taken_less_the_loads() -> None:
    scene = Scene(num_pages=40, levels=Shelf((Held("fast", 5),)))
    scene.engine._scheduler._load_costs.computed(100, 100.0)  # a second a token
    scene.ask(LONG)
    assert scene.engine.cache_stats().saved_s == pytest.approx(20 * 1.0 - 0.5)


def flush(scene: Scene, level: str | None = None) -> dict[str, int | None]:
    found = []
    events: list[Event] = [Flush(7, level)]
    while not found:
        found += scene.engine.step(events).flushed
        events = []
    (flushed,) = found
    assert flushed.query_id == 7
    return flushed.pages


def test_an_emptied_cache_says_so() -> None:
    scene = Scene()
    scene.ask(PROMPT)
    scene.now = 150.0
    assert flush(scene) == {"device": 2}
    assert flush(scene) == {"device": 0}
    assert flush(scene, "disk") == {}
    scene.now = 153.0
    told = scene.ask(PROMPT)
    assert told.missed[0] == MissedRun(MissReason.EVICTED, 0, 8, EvictionCause.FLUSH, 3.0, "device")
    assert scene.engine.cache_stats().evictions["flush"] == 2
    assert scene.ask(PROMPT).all.num_cached_tokens == 8


def test_one_level_is_emptied_alone() -> None:
    below = DigestLevels(random.Random(0), store_at_uses=(1,), wants_evicted=False, forgets=False)
    scene = Scene(levels=below)
    scene.ask(PROMPT)
    scene.engine.step()
    assert len(below.pages) == 2
    assert flush(scene, "device") == {"device": 2}
    assert scene.ask(PROMPT).levels[1] == LevelMatch("digest", 2, 0, None)
    assert flush(scene, "digest") == {"digest": 2}
    assert scene.ask(PROMPT).levels[0].num_pages == 2
    assert flush(scene) == {"device": 2, "digest": 0}
    assert scene.ask(PROMPT).all.num_cached_tokens == 0


def test_who_runs_through_a_flush_keeps_its_answer_and_shares_nothing() -> None:
    scene = Scene()
    order = scene.order(PROMPT, new=12)
    alone = [digest(PROMPT, 0, 0)]
    while len(alone) < 12:
        alone.append(digest([*PROMPT, *alone], 0, 0))
    tokens: list[int] = []
    events: list[Event] = [Arrival(order)]
    while events or scene.engine.has_work:
        for output in scene.engine.step(events).outputs:
            tokens += [sample.token_id for sample in output.samples]
        events = [Flush(1, None)] if len(tokens) == 4 else []
    assert tokens == alone[: len(tokens)]
    assert len(tokens) > 8
    assert scene.ask([*PROMPT, *tokens]).all.num_cached_tokens == 0


def test_a_large_cache_is_emptied_in_steps_and_nobody_finds_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache_manager, "MAX_EMPTIED", 2)
    below = DigestLevels(random.Random(0), store_at_uses=(1,), wants_evicted=True, forgets=False)
    scene = Scene(num_pages=14, levels=below)
    for first in (10, 20, 30):
        scene.ask(list(range(first, first + 18)))
    while scene.engine.has_work:
        scene.engine.step()
    cache = scene.engine._cache
    assert len(cache.index) == 12
    long = scene.order([9] * 6, new=20)
    asked = [scene.order([*range(first, first + 18), 1], new=6) for first in (10, 20)]
    events: list[Event] = [Arrival(long), Flush(7, None), *map(Arrival, asked)]
    ended: dict[str, Finished] = {}
    tokens: dict[str, list[int]] = {}
    left = []
    stored_before = set(below.pages)
    for k in range(200):
        if not events and not scene.engine.has_work:
            break
        outputs = scene.engine.step(events)
        events = []
        if cache.is_emptying:
            assert cache.evictions.counts[EvictionCause.FLUSH] <= 2 * (k + 1)
            left.append(len(cache.index))
            assert not below.pages.keys() & stored_before, "what was flushed goes down after it"
        for output in outputs.outputs:
            tokens.setdefault(output.request_id, []).extend(s.token_id for s in output.samples)
            if output.finished is not None:
                ended[output.request_id] = output.finished
    assert len(left) > 2
    assert cache.evictions.num_evicted > 0, "pages were needed before it was done"
    for order in asked:
        told = ended[order.request_id].explanation
        assert told is not None
        assert told.num_cached_tokens == 0
        alone: list[int] = []
        while len(alone) < 6:
            alone.append(digest([*order.prompt_token_ids, *alone], 0, 0))
            if alone[-1] == 0:
                break
        assert tokens[order.request_id] == alone
    assert cache.allocator.num_held == 0
    assert scene.ask(list(range(30, 48))).all.num_cached_tokens == 0
    assert scene.ask(list(range(30, 48))).all.num_cached_tokens == 16
    assert scene.engine.stats().broken_laws == ()
