"""Every level against shadow memory: whatever happens, a page is the right one or a miss.

The shadow knows what each number's page is, and which pages a level may know. Faults strike the
disk's files while nobody has them open, the server's values, and the clock (a slow medium).
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)
from level_pages import ROOT, key_of, page_of

from kvpaging.levels.disk import DiskLevel
from kvpaging.levels.host import HostLevel
from kvpaging.levels.level import Level

NUMBERS = st.integers(0, 40)
CHAINS = st.builds(range, NUMBERS, NUMBERS)
CAPACITY = 1 << 20


def payload_bytes(number: int) -> int:
    return (0, 7, 500, 20_000, 50_000)[number % 5]


class LevelMachine(RuleBasedStateMachine):
    level: Level
    known: set[int]
    now_s: float
    slowness_s: float

    def clock(self) -> float:
        self.now_s += self.slowness_s
        return self.now_s

    def start(self) -> None:
        self.known = set()
        self.now_s = self.slowness_s = 0.0

    @rule(numbers=CHAINS, compressible=st.booleans())
    def store(self, numbers: range, compressible: bool) -> None:
        pages = [page_of(n, payload_bytes(n)) for n in numbers]
        held = self.level.store(pages, 100.0)
        assert 0 <= held <= len(pages)
        self.known.update(numbers)
        self.level.contains([page.key for page in pages])

    @rule(numbers=CHAINS)
    def load(self, numbers: range) -> None:
        keys = [key_of(n) for n in numbers]
        believed = self.level.contains(keys)
        answers = self.level.load(keys, 100.0)
        assert len(answers) == len(keys)
        for number, is_believed, page in zip(numbers, believed, answers, strict=True):
            if page is not None:
                assert page == page_of(number, payload_bytes(number))
                assert number in self.known
                assert is_believed

    @rule(slowness_s=st.sampled_from([0.0, 0.0, 1.0, 30.0, 200.0]))
    def slow_down(self, slowness_s: float) -> None:
        self.slowness_s = slowness_s

    @rule()
    def clear(self) -> None:
        self.level.clear()
        self.known = set()
        assert not any(self.level.contains([key_of(n) for n in range(41)]))

    @invariant()
    def is_within_its_bound(self) -> None:
        stats = self.level.stats()
        assert stats.num_bytes is not None
        assert stats.num_bytes <= CAPACITY
        assert stats.num_pages == sum(self.level.contains([key_of(n) for n in range(41)]))
        taken_or_refused = stats.stored + stats.known + stats.refused
        assert taken_or_refused <= stats.stores <= taken_or_refused + stats.late


class HostMachine(LevelMachine):
    @initialize()
    def open(self) -> None:
        self.start()
        self.level = HostLevel(CAPACITY, clock=self.clock)


class DiskMachine(LevelMachine):
    @initialize(segment_bytes=st.sampled_from([1, 3000, 60_000, 300_000]))
    def open(self, segment_bytes: int) -> None:
        self.start()
        self.directory = Path(tempfile.mkdtemp()) / "cache"
        self.segment_bytes = segment_bytes
        self.is_damaged = False
        self.reopen(compress=True)

    def reopen(self, *, compress: bool) -> None:
        self.level = DiskLevel(
            self.directory,
            CAPACITY,
            root=ROOT,
            item_bytes=2,
            compress=compress,
            segment_bytes=self.segment_bytes,
            clock=self.clock,
        )

    def believed(self) -> list[bool]:
        return self.level.contains([key_of(n) for n in range(41)])

    @rule(compress=st.booleans(), is_killed=st.booleans())
    def restart(self, compress: bool, is_killed: bool) -> None:
        before = self.believed()
        if is_killed:
            left = self.directory.with_name("left")
            shutil.copytree(self.directory, left)
        self.level.close()
        if is_killed:
            shutil.rmtree(self.directory)
            left.rename(self.directory)
        self.reopen(compress=compress)
        after = self.believed()
        assert all(then <= now for then, now in zip(before, after, strict=True))
        if not self.is_damaged:  # else a page found corrupt is believed again until it is read
            assert after == before

    @rule(seed=st.integers(0, 1000), what=st.sampled_from(["flip", "cut", "grow", "delete"]))
    def damage(self, seed: int, what: str) -> None:
        before = self.believed()
        was_damaged, self.is_damaged = self.is_damaged, True
        self.level.close()
        rng = random.Random(seed)
        path = rng.choice(sorted(p for p in self.directory.iterdir() if p.name != "lock"))
        size = path.stat().st_size
        at = rng.randrange(size) if size else 0
        match what:
            case "flip" if size:
                data = bytearray(path.read_bytes())
                data[at] ^= 1 << rng.randrange(8)
                path.write_bytes(data)
            case "cut":
                os.truncate(path, at)
            case "grow":
                path.write_bytes(path.read_bytes() + rng.randbytes(100))
            case _:
                path.unlink()
        self.reopen(compress=True)
        after = self.believed()
        if not was_damaged:
            assert all(now <= then for now, then in zip(after, before, strict=True))

    @invariant()
    def files_are_within_the_bound(self) -> None:
        num_bytes = sum(path.stat().st_size for path in self.directory.iterdir())
        assert num_bytes == self.level.stats().num_bytes <= CAPACITY

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            self.level.close()
            shutil.rmtree(self.directory.parent)


FEW = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestHost = HostMachine.TestCase
TestHost.settings = FEW
TestDisk = DiskMachine.TestCase
TestDisk.settings = FEW
