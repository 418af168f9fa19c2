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

from kvpaging.base.ids import RequestId
from kvpaging.engine.engine import Engine
from kvpaging.execution import page_mover
from kvpaging.levels import disk
from kvpaging.scheduling.events import Abort, Arrival, Event
from kvpaging.scheduling.outputs import FinishReason, StepOutputs
from kvpaging.scheduling.request import Request, SamplingParams

STEP_S = 0.1
MAX_STEPS = 4000
"""An accepted request has ended by then."""
# Afresh in each run, and the same in all of its workers: it is part of the test's name.
SEED = zlib.crc32(os.environ.get("PYTEST_XDIST_TESTRUNUID", secrets.token_hex(8)).encode())
SOAK_HOURS = float(os.environ.get("SOAK_HOURS", "1"))


@dataclass
class Open:
    """A request that has not ended."""

    request: Request
    since: int
    tokens: dict[int, list[int]] = field(default_factory=dict)
    num_ended: int = 0
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
        page_size = rng.choice([2, 4])
        self.config = msgspec.structs.replace(
            digest_config(
                # Too few for some requests alone, and for most of them together.
                num_pages=rng.randint(28, 48) // page_size,
                page_size=page_size,
                max_num_seqs=rng.randint(3, 6),
                max_num_batched_tokens=rng.randint(6, 20),
                max_model_len=40,
                eos_token_ids=(0, 1, 2) if rng.random() < 0.5 else (),
            ),
            async_scheduling=rng.random() < 0.5,
        )
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

    def kill(self) -> None:
        """The process ends at any moment, and another one begins with what is on disk."""
        left = killed(self.directory, self.rng)
        self.stop()
        self.open.clear()
        self.directory = left
        self.start()

    def stop(self) -> None:
        stats = self.engine.stats()
        assert stats.broken_laws == ()
        self.count("preemptions", stats.num_preemptions)
        self.count("loaded", stats.num_loaded_pages)
        for level in self.below.levels:
            found = level.stats()
            for name in ("hits", "stored", "corrupt", "failures", "evicted"):
                self.count(f"{level.name} {name}", getattr(found, name))
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
        names = ("preemptions", "disk corrupt", "remote corrupt", "disk failures")
        return [
            name
            for name, number in (least | dict.fromkeys(names, 0)).items()
            if self.totals[name] <= number
        ]

    def step(self, events: list[Event]) -> None:
        self.num_steps += 1
        self.now_s += STEP_S
        if self.num_steps % 4 == 0 and len(self.values) > 200:
            del self.values[self.rng.choice(list(self.values))]
        self.take(self.engine.step(events))

    def take(self, outputs: StepOutputs) -> None:
        for rejection in outputs.rejections:
            assert rejection.code in ("overloaded", "pool_exceeded"), rejection
            del self.open[rejection.request_id]
        for output in outputs.outputs:
            known = self.open[output.request_id]
            tokens = known.tokens.setdefault(output.output_index, [])
            tokens += [sample.token_id for sample in output.samples]
            if output.finished is None:
                continue
            self.check(known, output.output_index, output.finished.reason)
            known.num_ended += 1
            if known.num_ended == known.request.n:
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
        request = Request(
            name,
            tuple(prompt),
            sampling,
            n=rng.choice([1, 1, 1, 2]),
            priority=rng.choice([0, 0, 0, 1]),
            namespace=rng.choice([b"a", b"a", b"b"]),
        )
        self.open[name] = Open(request, self.num_steps)
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
            if rng.random() < strikes:
                self.below.strike()
            self.step(events)
            if self.num_steps % 50 == 0:
                oldest = min((known.since for known in self.open.values()), default=None)
                assert oldest is None or self.num_steps - oldest < MAX_STEPS, "it never ends"

    def rest(self) -> None:
        """All requests end, and the laws hold over every page."""
        self.below.heal()
        first = self.num_steps
        while self.engine.has_work:
            self.step([])
            assert self.num_steps - first < MAX_STEPS, "work is left and nothing happens"
        assert not self.open
        cache = self.engine._cache
        pages = cache.allocator
        assert pages.num_held == 0
        assert pages.num_quarantined == 0
        assert not cache.leases
        assert not self.executor.rows
        while self.engine.audit_idle():
            pass
        assert self.engine.stats().broken_laws == ()


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
    world.stop()
    assert world.totals["ended"] > 50
    assert world.totals["loaded"] > 0


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
    seen: list[tuple[int, int, int]] = []
    while world.now_s < SOAK_HOURS * 3600:
        world.busy(num_steps, strikes=0.02)
        world.rest()
        gc.collect()
        files = len(list(Path("/proc/self/fd").iterdir()))
        seen.append((resident_bytes(), files, threading.active_count()))
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
    assert max(files for _, files, _ in settled) <= max(files for _, files, _ in first) + 4
    assert max(threads for _, _, threads in settled) <= max(threads for *_, threads in first) + 4
    assert settled[-1][0] < settled[0][0] + 24 * 2**20
