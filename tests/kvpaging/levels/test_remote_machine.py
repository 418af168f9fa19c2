"""The remote level against shadow memory, on a server that can do all that a server does wrong.

What comes back is what was stored, or a miss. The server is what a `RedisLink` is to the level: it
counts the bytes under way, knows when nobody may ask it (its own breaker says so), and time is its
to spend. Calls that other threads make at the same time are calls from within a call.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from level_pages import ROOT, key_of, page_of

from kvpaging.levels.breaker import FAILURES, FIRST_PAUSE_S, LONGEST_PAUSE_S
from kvpaging.levels.codec import PageCodec, read_header
from kvpaging.levels.level import StoredPage
from kvpaging.levels.redis_link import Refusal
from kvpaging.levels.remote import RemoteLevel

PAGES = 30
NUMBERS = st.integers(0, PAGES - 1)
CHAINS = st.builds(range, NUMBERS, NUMBERS)
PAYLOAD_BYTES = 20_000
BATCH_BYTES = 100_000
IN_FLIGHT_BYTES = 220_000
DEADLINE_S = 0.2
TTL_S = 100.0
MOODS = ("dead", "slow", "cut", "refuses", "other bytes", "swapped", "forged", "nonsense", "lies")
FAILING = ("dead", "slow", "cut")


@functools.cache
def page(number: int) -> StoredPage:
    return page_of(number, PAYLOAD_BYTES)


class FaultyServer:
    """Values that expire, a clock, and a mood."""

    address = "nowhere"

    def __init__(self) -> None:
        self.now_s = 0.0
        self.mood = "well"
        self.rng = random.Random(0)
        self.level: RemoteLevel | None = None
        self.meanwhile: list[Sequence[int]] = []
        """What other threads load while the next calls are under way."""
        self.num_calls = self.num_failed = 0
        self.closed_until_s = 0.0
        self._values: dict[bytes, tuple[bytes, float]] = {}
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S

    def clock(self) -> float:
        return self.now_s

    def forget(self) -> None:
        self._values.clear()

    def has(self, name: bytes) -> bool:
        return name in self._values and self._values[name][1] > self.now_s

    def call(
        self, commands: Sequence[tuple[Any, ...]], deadline_s: float
    ) -> tuple[list[object], str | None]:
        assert self.level is not None
        assert self.now_s >= self.closed_until_s, "asked while it was to be left alone"
        assert 0 < deadline_s <= DEADLINE_S
        taken = IN_FLIGHT_BYTES - self.level._budget._left
        assert sum(len(command[2]) for command in commands if command[0] == b"SET") <= taken
        assert taken <= IN_FLIGHT_BYTES
        if self._failures >= FAILURES:
            self.closed_until_s = self.now_s + self._pause_s  # one trial at a time
        self.num_calls += 1
        while self.meanwhile:
            self.level.load([key_of(n) for n in self.meanwhile.pop()], 1.0)
        replies, trouble = self._replies(commands, deadline_s)
        carried = sum(len(reply) for reply in replies if isinstance(reply, bytes))
        assert carried <= taken + 2 * len(commands)
        self._note(is_well=trouble is None)
        return replies, trouble

    def close(self) -> None:
        pass

    def _replies(
        self, commands: Sequence[tuple[Any, ...]], deadline_s: float
    ) -> tuple[list[object], str | None]:
        if self.mood not in FAILING:
            return [self._answer(command) for command in commands], None
        if self.mood == "dead":
            return [], "the connection is refused"
        num_in_time = self.rng.randrange(len(commands))
        replies = [self._answer(command) for command in commands[:num_in_time]]
        if self.mood == "slow":
            self.now_s += deadline_s
            return replies, "not in time"
        return replies, "the connection is gone"

    def _note(self, *, is_well: bool) -> None:
        if is_well:
            self._failures, self._pause_s, self.closed_until_s = 0, FIRST_PAUSE_S, 0.0
            return
        self.num_failed += 1
        self._failures += 1
        if self._failures >= FAILURES:
            self.closed_until_s = self.now_s + self._pause_s
            self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s)

    def _answer(self, command: tuple[Any, ...]) -> object:
        if self.mood == "refuses":
            return Refusal("OOM command not allowed")
        if self.mood == "nonsense":
            return self.rng.choice([7, -1, None, [b"OK"], b"", b"x" * 40])
        match command:
            case (b"GET", name):
                return self._value(name)
            case (b"SET", name, value, b"PX", ttl_ms):
                if self.mood != "lies":
                    self._values[name] = (bytes(value), self.now_s + ttl_ms / 1000)
                return b"OK"
            case (b"PEXPIRE", name, ttl_ms):
                if self.has(name):
                    self._values[name] = (self._values[name][0], self.now_s + ttl_ms / 1000)
                return int(self.has(name) or self.mood == "lies")
            case (b"SCAN", _, b"MATCH", pattern, b"COUNT", _):
                assert all(name.startswith(pattern[:-1]) for name in self._values)
                return [b"0", list(self._values)]
            case (b"UNLINK", name):
                return int(self._values.pop(name, None) is not None)
        raise AssertionError(command)

    def _value(self, name: bytes) -> bytes | None:
        if not self.has(name):
            return None
        value, _ = self._values[name]
        if self.mood == "swapped":
            return self.rng.choice(list(self._values.values()))[0]
        if self.mood == "forged":  # all but the secret is known to it
            asked = read_header(value[32:])
            other = page(self.rng.randrange(PAGES))._replace(key=asked.key, parent=asked.parent)
            return value[:32] + PageCodec(ROOT, 2).encode(other)
        if self.mood != "other bytes":
            return value
        changed = bytearray(value)
        changed[self.rng.randrange(len(changed))] ^= 1 << self.rng.randrange(8)
        return bytes(changed[: self.rng.choice([len(changed), self.rng.randrange(len(changed))])])


class RemoteMachine(RuleBasedStateMachine):
    @initialize(compress=st.booleans(), seed=st.integers(0, 1000))
    def connect(self, compress: bool, seed: int) -> None:
        self.server = FaultyServer()
        self.server.rng.seed(seed)
        self.stored: set[int] = set()
        self.level = RemoteLevel(
            "redis://nowhere",
            secret=b"s" * 32,
            root=ROOT,
            item_bytes=2,
            compress=compress,
            ttl_s=TTL_S,
            batch_deadline_s=DEADLINE_S,
            batch_bytes=BATCH_BYTES,
            in_flight_bytes=IN_FLIGHT_BYTES,
            clock=self.server.clock,
        )
        self.level._link.close()
        self.level._link = self.server  # type: ignore[assignment]
        self.server.level = self.level

    @rule(numbers=CHAINS)
    def store_some(self, numbers: range) -> None:
        self.store(numbers)

    def store(self, numbers: range) -> None:
        calls, failed = self.server.num_calls, self.server.num_failed
        closed = self.server.now_s < self.server.closed_until_s
        pages = [page(n) for n in numbers]
        held = self.level.store(pages, 10.0)
        assert 0 <= held <= len(pages)
        self.stored.update(numbers)
        if closed:
            assert held == 0
            assert self.server.num_calls == calls
        assert self.server.num_failed - failed <= 1
        if self.server.mood == "well" and not closed:
            assert held == len(pages)
            assert all(map(self.is_there, numbers))

    @rule(numbers=CHAINS, others=st.lists(CHAINS, max_size=3))
    def load_beside_others(self, numbers: range, others: list[range]) -> None:
        self.load(numbers, others)

    def load(self, numbers: range, others: list[range]) -> None:
        server = self.server
        began_s, failed = server.now_s, server.num_failed
        closed = began_s < server.closed_until_s
        server.meanwhile = list(others)
        was_there = [self.is_there(n) for n in numbers]
        found = self.level.load([key_of(n) for n in numbers], 10.0)
        server.meanwhile = []
        for number, there, found_page in zip(numbers, was_there, found, strict=True):
            if found_page is not None:
                assert found_page == page(number)
                assert there
                assert number in self.stored
        assert server.num_failed - failed <= 1 + len(others)
        assert server.now_s - began_s <= DEADLINE_S * (1 + len(others)) + 1e-9
        if closed:
            assert found == [None] * len(numbers)
        elif server.mood == "well" and not others:
            assert [answer is not None for answer in found] == was_there

    @rule(mood=st.sampled_from(["well"] * 6 + list(MOODS)))
    def change(self, mood: str) -> None:
        self.server.mood = mood

    @rule(numbers=CHAINS, mood=st.sampled_from(MOODS))
    def load_what_was_just_stored(self, numbers: range, mood: str) -> None:
        self.store(numbers)
        before, self.server.mood = self.server.mood, mood
        self.load(numbers, [])
        self.server.mood = before

    @rule(seconds=st.sampled_from([0.1, 1.5, 3.0, 40.0, 1.1 * TTL_S]))
    def wait(self, seconds: float) -> None:
        self.server.now_s += seconds

    @rule()
    def flush_server(self) -> None:
        self.server.forget()

    @rule()
    def clear(self) -> None:
        closed = self.server.now_s < self.server.closed_until_s
        try:
            self.level.clear()
        except ConnectionError:
            assert closed or self.server.mood != "well"
        else:
            assert not any(map(self.is_there, range(PAGES)))
            assert not closed

    def is_there(self, number: int) -> bool:
        return self.server.has(self.level._seal.name(key_of(number)))

    @invariant()
    def nothing_is_left_under_way(self) -> None:
        if hasattr(self, "level"):
            assert self.level._budget._left == IN_FLIGHT_BYTES

    @invariant()
    def the_breaker_is_open_when_the_server_failed(self) -> None:
        if hasattr(self, "level"):
            is_closed = self.server.now_s < self.server.closed_until_s
            assert self.level._breaker.is_open is is_closed
            if is_closed:
                assert not any(self.level.contains([key_of(n) for n in range(PAGES)]))


TestRemote = RemoteMachine.TestCase
TestRemote.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
