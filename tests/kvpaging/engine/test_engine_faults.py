"""Scheduler, cache, mover and all levels, while everything in them goes wrong: the right tokens.

Each token depends on all that is read through the page table, so a wrong, stale, half or
unfinished page shows. The soak is an hour of simulated steps; `SOAK_HOURS` makes it longer.
"""

from __future__ import annotations

import gc
import os
import random
import secrets
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from digest_model import digest_config, expected_tokens
from faulty_levels import FaultyLevels, HalfWriter, MovingExecutor, killed
from retentions import RETENTIONS

from kvpaging.base.ids import RequestId
from kvpaging.cache.pins import MIN_SWEPT
from kvpaging.cache.retention import AS_IT_IS
from kvpaging.engine.engine import Engine
from kvpaging.execution import page_mover
from kvpaging.levels import disk
from kvpaging.scheduling.events import Abort, Arrival, Event, Flush, Unpin
from kvpaging.scheduling.outputs import FinishReason, StepOutputs
from kvpaging.scheduling.plan import StepPlan
from kvpaging.scheduling.request import Request, SamplingParams
from kvpaging.scheduling.sequence import Sequence

STEP_S = 0.1
MAX_STEPS = 4000
"""An accepted request has ended by then, if it is not idle work."""
MAX_MODEL_LEN = 40
# Those that ask for something store little, and the levels are to be full of faults.
WISHES = [*RETENTIONS, *[AS_IT_IS] * len(RETENTIONS)]
REFUSED = frozenset({"overloaded", "pool_exceeded", "tenant_budget_exceeded", "pin_limit_exceeded"})
# Afresh in each run, and the same in all of its workers: it is part of the test's name.
SEED = zlib.crc32(os.environ.get("PYTEST_XDIST_TESTRUNUID", secrets.token_hex(8)).encode())
SOAK_HOURS = float(os.environ.get("SOAK_HOURS", "1"))


@dataclass
class Open:
    """A request that has not ended."""

    request: Request
    since: int
    tokens: dict[int, list[int]] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    """Outputs that have told their end."""
    is_aborted: bool = False


class World:
    """An engine, its clients, its levels, and what has been seen of them."""

    def __init__(self, directory: Path, rng: random.Random):
        self.rng = rng
        self.now_s = 0.0
        self.num_steps = 0
        self.open: dict[RequestId, Open] = {}
        self.turns: list[list[int]] = [[1]]
        self.values: dict[bytes, bytes] = {}
        self.totals: dict[str, int] = {}
        self.pinning: set[RequestId] = set()
        """Requests that may have made a pin which nobody ended."""
        self.flushing: set[int] = set()
        page_size = rng.choice([2, 4])
        self.config = msgspec.structs.replace(
            digest_config(
                # Too few for most requests together; pins may have what one alone leaves, or there
                # are too few for some requests alone.
                num_pages=rng.randint(*rng.choice([(28, 39), (44, 60), (44, 60)])) // page_size,
                page_size=page_size,
                max_num_seqs=rng.randint(3, 6),
                max_num_batched_tokens=rng.randint(6, 20),
                max_model_len=MAX_MODEL_LEN,
                eos_token_ids=(0, 1, 2) if rng.random() < 0.5 else (),
                max_pinned_ratio=1.0,
            ),
            async_scheduling=rng.random() < 0.5,
        )
        self.tenant_pages = {b"a": None, b"b": rng.choice([None, 32 // page_size])}
        self.min_uses = rng.choice([(0, 1, 1), (0, 1, 2), (1, 2, 0), (0, 0, 0), (2, 1, 3)])
        self.directory = directory
        self.start()

    def clock(self) -> float:
        return self.now_s

    def start(self) -> None:
        pages = self.config.scheduler
        self.below = FaultyLevels(
            self.directory,
            pages.page_size,
            self.rng,
            self.clock,
            values=self.values,
            min_uses=self.min_uses,
        )
        self.executor = MovingExecutor(pages.num_pages, pages.page_size, self.below, self.clock)
        self.engine = Engine(self.config, self.executor, clock=self.clock)
        self.watch()

    def watch(self) -> None:
        """Laws 9 and 10 hold of every plan."""
        scheduler, limits = self.engine._scheduler, self.config.scheduler
        schedule = scheduler.schedule

        def checked(events: list[Event], now_s: float) -> StepPlan:
            before = {sequence.seq_id for sequence in scheduler.running}
            plan = schedule(events, now_s)
            num_new_tokens = sum(entry.num_new_tokens for entry in plan.scheduled)
            assert num_new_tokens <= limits.max_num_batched_tokens
            assert len(plan.scheduled) <= len(scheduler.running) <= limits.max_num_seqs
            placed = [s for s in scheduler.running if s.seq_id not in before]
            for other in scheduler._waiting.upcoming() if placed else ():
                rivals = [s for s in placed if rank(s) == rank(other)]
                assert all(place(s) < place(other) for s in rivals), "it was overtaken"
            return plan

        scheduler.schedule = checked  # type: ignore[method-assign, assignment]

    def kill(self) -> None:
        """The process ends at any moment, and another one begins with what is on disk."""
        left = killed(self.directory, self.rng)
        self.stop()
        self.open.clear()
        self.pinning.clear()
        self.flushing.clear()
        self.directory = left
        self.start()

    def stop(self) -> None:
        stats = self.engine.stats()
        assert stats.broken_laws == ()
        self.count("preemptions", stats.num_preemptions)
        self.count("loaded", stats.num_loaded_pages)
        for level in self.below.levels:
            found = level.stats()
            for name in ("hits", "stored", "corrupt", "failures"):
                self.count(f"{level.name} {name}", getattr(found, name))
            self.count(f"{level.name} evicted", found.evicted.get("room", 0))
            for mood, times in level.num_faults.items():
                self.count(mood, times)
        self.below.heal()
        self.engine.close()

    def count(self, name: str, amount: int) -> None:
        self.totals[name] = self.totals.get(name, 0) + amount

    def missing(self) -> list[str]:
        """What a soak must have met and has not, up to the last stop or kill.

        Not every seed fills the disk; what a full one does is held by the tests of levels.
        """
        least = dict.fromkeys(("host hits", "disk hits", "remote hits", "ended"), 20 * SOAK_HOURS)
        names = ["preemptions", "disk corrupt", "remote corrupt", "disk failures", "flushed"]
        if self.config.scheduler.max_pinned_pages:
            names.append("pinned")
        return [
            name
            for name, number in (least | dict.fromkeys(names, 0)).items()
            if self.totals.get(name, 0) <= number
        ]

    def step(self, events: list[Event]) -> None:
        self.num_steps += 1
        self.now_s += STEP_S
        if self.num_steps % 4 == 0 and len(self.values) > 200:
            del self.values[self.rng.choice(list(self.values))]
        self.take(self.engine.step(events))

    def take(self, outputs: StepOutputs) -> None:
        for rejection in outputs.rejections:
            assert rejection.code in REFUSED, rejection
            self.count(rejection.code, 1)
            assert not self.open.pop(rejection.request_id).tokens
            self.pinning.discard(rejection.request_id)
        for flushed in outputs.flushed:
            self.flushing.remove(flushed.query_id)
            self.count("flushed", 1)
        for output in outputs.outputs:
            known = self.open[output.request_id]
            assert output.output_index not in known.ended, "it goes on after its end"
            tokens = known.tokens.setdefault(output.output_index, [])
            tokens += [sample.token_id for sample in output.samples]
            if output.finished is None:
                continue
            self.check(known, output.output_index, output.finished.reason)
            assert (output.finished.message is None) == (output.finished.reason in COMPLETE)
            known.ended.add(output.output_index)
            if len(known.ended) == known.request.n:
                del self.open[output.request_id]

    def check(self, known: Open, index: int, reason: FinishReason) -> None:
        request, got = known.request, known.tokens[index]
        stop = frozenset(self.config.eos_token_ids)
        want = expected_tokens(
            request.prompt_token_ids,
            request.sampling.seed,
            index,
            request.sampling.max_new_tokens,
            stop,
        )
        if reason is FinishReason.ABORT:
            assert known.is_aborted
            assert got == want[: len(got)]
            return
        assert got == want, (reason, request)
        self.count("ended", 1)
        self.turns = [*self.turns[-30:], [*request.prompt_token_ids, *got]]

    def arrival(self) -> Arrival:
        rng = self.rng
        prompt = [*rng.choice(self.turns)[: rng.randint(1, 33)], rng.randint(1, 2)]
        name = RequestId(f"{self.num_steps}-{len(self.open)}-{rng.random()}")
        sampling = SamplingParams(max_new_tokens=rng.randint(1, 6), seed=rng.randint(0, 1))
        namespace = rng.choice([b"a", b"a", b"b"])
        wish = rng.choice(WISHES)
        if wish.pin:
            limits = self.config.scheduler
            most = limits.page_size * (limits.max_pinned_pages + 1)
            prompt = [*prompt, *[1] * limits.page_size][:most]
        request = Request(
            name,
            tuple(prompt),
            sampling,
            n=rng.choice([1, 1, 1, 2]),
            priority=rng.choice([0, 0, 0, 1]),
            namespace=namespace,
            tenant=namespace.decode(),
            tenant_pages=self.tenant_pages[namespace],
            retention=wish,
            is_idle=rng.random() < 0.05,
            explain=rng.random() < 0.2,
        )
        self.open[name] = Open(request, self.num_steps)
        if request.retention.pin:
            self.pinning.add(name)
        return Arrival(request)

    def busy(self, num_steps: int, *, strikes: float) -> None:
        """Arrivals, aborts and faults by lot."""
        rng = self.rng
        for _ in range(num_steps):
            events: list[Event] = []
            while len(self.open) < 40 and rng.random() < 0.4:
                events.append(self.arrival())
            if self.open and rng.random() < 0.1:
                known = self.open[rng.choice(list(self.open))]
                known.is_aborted = True
                events += [Abort(known.request.request_id)] * rng.choice([1, 2])
            if self.pinning and rng.random() < 0.05:
                events.append(self.unpin(rng.choice(sorted(self.pinning))))
            if rng.random() < 0.002:
                events.append(self.flush(rng.choice([None, "device", "host", "disk", "remote"])))
            if rng.random() < strikes:
                self.below.strike()
            self.step(events)
            self.count("pinned", self.engine._cache.pins.num_owned)
            if self.num_steps % 50 == 0:
                waits = [known for known in self.open.values() if not known.request.is_idle]
                oldest = min((known.since for known in waits), default=None)
                assert oldest is None or self.num_steps - oldest < MAX_STEPS, "it never ends"

    def unpin(self, name: RequestId) -> Unpin:
        self.pinning.remove(name)
        return Unpin(name)

    def flush(self, level: str | None) -> Flush:
        self.flushing.add(self.num_steps)
        return Flush(self.num_steps, level)

    def empty(self) -> None:
        """At rest, nothing is left of what is emptied."""
        first = self.num_steps
        self.now_s += 60  # so that the remote server is asked again, whatever it did
        self.step([self.flush(None)])
        while self.engine.has_work or self.flushing:
            self.step([])
            assert self.num_steps - first < MAX_STEPS, "a flush is not answered"
        assert not self.engine._cache.index
        levels = self.executor.mover.stats().levels
        assert (levels["host"].num_pages, levels["disk"].num_pages) == (0, 0)
        assert not self.values

    def rest(self) -> None:
        """All requests and pins end, and the laws hold over every page."""
        self.below.heal()
        first = self.num_steps
        while self.engine.has_work:
            self.step([])
            assert self.num_steps - first < MAX_STEPS, "work is left and nothing happens"
        assert not self.open
        assert not self.flushing
        cache = self.engine._cache
        pages = cache.allocator
        assert pages.num_held == cache.pins.num_owned
        endless = [name for name in self.pinning if self.engine.pins(name=name)]
        self.pinning.clear()
        self.step([Unpin(name) for name in endless[::2]])
        assert {pin.name for pin in self.engine.pins()} <= set(endless[1::2])
        self.step([Unpin(name) for name in endless[1::2] if self.ends_not(name)])
        while self.engine.due_in_s is not None:
            self.step([])
            assert self.num_steps - first < MAX_STEPS, "something's time is over and it stays"
        assert len(cache.pins) == cache.pins.num_pages == cache.pins.num_owned == 0
        assert pages.num_held == 0
        assert pages.num_quarantined == 0
        assert not cache.leases
        assert not self.executor.rows
        while self.engine.audit_idle():
            pass
        assert self.engine.stats().broken_laws == ()

    def ends_not(self, name: RequestId) -> bool:
        """A pin is left that nobody would end."""
        return any(pin.ends_in_s is None for pin in self.engine.pins(name=name))


COMPLETE = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT)


def rank(sequence: Sequence) -> tuple[bool, int]:
    """Within it the first come is the first served."""
    return sequence.request.is_idle, sequence.request.priority


def place(sequence: Sequence) -> tuple[int, int]:
    """When it came, whatever became of it since."""
    return sequence.order[2], sequence.output_index


@pytest.fixture
def small_queues(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(page_mover, "MAX_QUEUED_BYTES", 1 << 16)
    monkeypatch.setattr(page_mover, "STEP_BYTES", 1 << 13)
    monkeypatch.setattr(disk, "SegmentWriter", HalfWriter)
    yield
    HalfWriter.is_full = False


@pytest.mark.usefixtures("small_queues")
@pytest.mark.parametrize("seed", range(8))
def test_whatever_goes_wrong_below_the_tokens_are_right(seed: int, tmp_path: Path) -> None:
    world = World(tmp_path / "pages", random.Random(seed))
    world.busy(200, strikes=0.0)
    world.busy(500, strikes=0.1)
    world.kill()
    world.busy(300, strikes=0.1)
    world.rest()
    world.empty()
    world.stop()
    assert world.totals["ended"] > 50
    assert world.totals["loaded"] > 0
    assert (world.totals["pinned"] > 0) == (world.config.scheduler.max_pinned_pages > 0)


def resident_bytes() -> int:
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("small_queues")
@pytest.mark.parametrize("seed", [SEED])
def test_an_hour_of_steps_with_faults_leaves_nothing_behind(seed: int, tmp_path: Path) -> None:
    world = World(tmp_path / "pages", random.Random(seed))
    num_rounds = 24
    num_steps = int(SOAK_HOURS * 3600 / STEP_S / num_rounds)
    seen: list[tuple[int, int, int, int]] = []
    while world.now_s < SOAK_HOURS * 3600:
        world.busy(num_steps, strikes=0.02)
        world.rest()
        gc.collect()
        files = len(list(Path("/proc/self/fd").iterdir()))
        pins = world.engine._cache.pins
        kept = len(pins._ends) + len(pins._nodes) + len(pins._kept_by_key)
        seen.append((resident_bytes(), files, threading.active_count(), kept))
        if world.rng.random() < 0.3:
            world.kill()
    world.kill()  # counts
    # A rare seed takes longer until it has met everything.
    for _ in range(5 * num_rounds):
        if not (missing := world.missing()):
            break
        world.busy(num_steps, strikes=0.02)
        world.rest()
        world.kill()
    world.stop()
    assert not missing, (missing, world.totals)
    first, settled = seen[: len(seen) // 4], seen[len(seen) // 4 :]
    assert max(files for _, files, _, _ in settled) <= max(files for _, files, _, _ in first) + 4
    assert max(each[2] for each in settled) <= max(each[2] for each in first) + 4
    assert max(kept for *_, kept in seen) <= MIN_SWEPT, "pins that ended are remembered"
    assert settled[-1][0] < settled[0][0] + 24 * 2**20
