"""The engine process's loop, run in a thread of the test at one end of a socket pair."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
import pytest

from kvpaging.base.config import EngineConfig, EngineOptions, SchedulerConfig
from kvpaging.base.errors import ConfigError
from kvpaging.base.ids import RequestId
from kvpaging.cache.pins import PinState
from kvpaging.engine.connection import MAX_UNSENT_BYTES, FrameSplitter, encode_frame
from kvpaging.engine.messages import (
    PROTOCOL_VERSION,
    CacheStats,
    EngineStats,
    FromEngine,
    GetCacheStats,
    GetPages,
    Hello,
    Loading,
    PagePicture,
    PageState,
    Ready,
    Shutdown,
    StartFailed,
    StepDone,
    ToEngine,
)
from kvpaging.engine.process import OnProgress, SteppedEngine, run
from kvpaging.scheduling.events import Abort, Event
from kvpaging.scheduling.outputs import Rejection, StepOutputs

CONFIG = EngineConfig(
    model_dir="m",
    architecture="a",
    device="cpu",
    dtype="float32",
    kv_cache_dtype="float32",
    threads=1,
    kernels="none",
    exact=True,
    kv_cache_bytes=0,
    vocab_size=1,
    eos_token_ids=(),
    scheduler=SchedulerConfig(4, 16, 1, 16, 64, 8),
)


class ScriptedEngine:
    """Has as many steps of work as the abort messages name; audits as often as told."""

    config = CONFIG

    def __init__(self, output_bytes: int = 0, num_audits: int = 0, error: Exception | None = None):
        self.seen: list[Event] = []
        self.num_steps = 0
        self.num_audits = num_audits
        self.laws: tuple[str, ...] = ()
        self.closed = False
        self.has_stored_rest = False
        self.due_s: float | None = None
        self.stepped_s = 0.0
        """When the last step was."""
        self.num_questions = 0
        self._work = 0
        self._error = error
        self._filler = "x" * output_bytes

    @property
    def has_work(self) -> bool:
        return self._work > 0

    @property
    def due_in_s(self) -> float | None:
        self.num_questions += 1
        return None if self.due_s is None else max(0.0, self.due_s - time.monotonic())

    def step(self, events: Sequence[Event]) -> StepOutputs:
        self.due_s = None
        self.stepped_s = time.monotonic()
        if self._error is not None:
            raise self._error
        self.seen += events
        self._work += sum(int(event.request_id) for event in events if isinstance(event, Abort))
        self._work -= 1
        self.num_steps += 1
        filler = Rejection(RequestId("r"), self._filler, "none")
        return StepOutputs(rejections=(filler,) if self._filler else ())

    def stats(self) -> EngineStats:
        return EngineStats(step_id=self.num_steps, broken_laws=self.laws)

    def cache_stats(self, query_id: int) -> CacheStats:
        return CacheStats(query_id, num_recomputed_tokens=1)

    def pages(self) -> tuple[PageState, ...]:
        return (PageState(1, "free", 0, 0),)

    def pins(self, tenant: str | None, name: str | None) -> tuple[PinState, ...]:
        return (PinState("p", "t", 3, True, None),)

    def audit_idle(self) -> bool:
        self.num_audits -= 1
        if self.num_audits == 0:
            self.laws = ("a page leaked",)
        return self.num_audits > 0

    def store_rest(self) -> None:
        assert not self.closed
        self.has_stored_rest = True

    def close(self) -> None:
        self.closed = True


class Api:
    """The API's end, blocking."""

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.sock.settimeout(60)
        self._splitter = FrameSplitter(msgspec.msgpack.Decoder(FromEngine))
        self._inbox: list[FromEngine] = []

    def send(self, *messages: ToEngine) -> None:
        self.sock.sendall(b"".join(map(encode_frame, messages)))

    def read(self, num_bytes: int) -> None:
        data = self.sock.recv(num_bytes)
        if not data:
            raise EOFError
        self._inbox += self._splitter.feed(data)

    def receive(self) -> FromEngine:
        while not self._inbox:
            self.read(1 << 20)
        return self._inbox.pop(0)

    def greet(self) -> None:
        self.send(Hello(PROTOCOL_VERSION, EngineOptions("m")))
        assert self.receive() == Hello(PROTOCOL_VERSION)


class Started:
    """`run` in a thread, and its exit code."""

    def __init__(self, make: Callable[[EngineOptions, OnProgress], SteppedEngine]):
        ours, theirs = socket.socketpair()
        self.api = Api(ours)
        self.code: int | None = None
        self._thread = threading.Thread(target=self._run, args=(theirs, make), daemon=True)
        self._thread.start()

    def _run(
        self, sock: socket.socket, make: Callable[[EngineOptions, OnProgress], SteppedEngine]
    ) -> None:
        self.code = run(sock, make)

    def ended(self) -> int | None:
        self._thread.join(60)
        return self.code


Start = Callable[[ScriptedEngine], Started]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Started] = []

    def one(engine: ScriptedEngine) -> Started:
        process = Started(lambda options, on_progress: engine)
        started.append(process)
        process.api.greet()
        assert process.api.receive() == Ready(CONFIG)
        return process

    yield one
    for process in started:
        process.api.sock.close()
        assert process.ended() is not None


def test_events_are_stepped_until_no_work_is_left_and_then_it_sleeps(start: Start) -> None:
    engine = ScriptedEngine()
    api = start(engine).api
    api.send(Abort(RequestId("3")))
    steps = [api.receive() for _ in range(3)]
    assert [step.stats.step_id for step in steps if isinstance(step, StepDone)] == [1, 2, 3]
    time.sleep(0.1)
    assert engine.num_steps == 3
    assert engine.seen == [Abort(RequestId("3"))]


def test_events_that_come_during_a_step_are_in_the_next(start: Start) -> None:
    engine = ScriptedEngine()
    api = start(engine).api
    api.send(Abort(RequestId("2")), Abort(RequestId("5")))
    while engine.num_steps < 7:
        api.receive()
    assert [event.request_id for event in engine.seen if isinstance(event, Abort)] == ["2", "5"]


@pytest.mark.parametrize("num_audits", [0, 4])
def test_it_wakes_when_something_is_due_and_sleeps_until_then(
    start: Start, num_audits: int
) -> None:
    engine = ScriptedEngine(num_audits=num_audits)
    engine.due_s = due_s = time.monotonic() + 0.3
    api = start(engine).api
    time.sleep(0.1)
    num_questions = engine.num_questions
    told = api.receive()
    while isinstance(told, StepDone) and told.stats.broken_laws and not told.stats.step_id:
        told = api.receive()
    assert isinstance(told, StepDone)
    assert told.stats.step_id == 1
    assert engine.stepped_s >= due_s
    time.sleep(0.1)
    assert engine.num_steps == 1
    assert engine.num_questions - num_questions < 20, "it does not look all the time"


def test_what_is_due_in_a_year_is_slept_for(start: Start) -> None:
    engine = ScriptedEngine()
    engine.due_s = time.monotonic() + 366 * 86_400
    api = start(engine).api
    time.sleep(0.1)
    assert engine.num_questions < 10
    api.send(GetCacheStats(8))
    assert api.receive() == CacheStats(8, num_recomputed_tokens=1)
    assert engine.num_steps == 0


def test_pages_are_answered_without_a_step(start: Start) -> None:
    engine = ScriptedEngine()
    api = start(engine).api
    api.send(GetCacheStats(8))
    assert api.receive() == CacheStats(8, num_recomputed_tokens=1)
    api.send(GetPages(9))
    assert api.receive() == PagePicture(9, 16, (PageState(1, "free", 0, 0),))
    assert engine.num_steps == 0


def test_shutdown_and_end_of_stream_end_it_well(start: Start) -> None:
    engine = ScriptedEngine()
    process = start(engine)
    process.api.send(Shutdown())
    assert process.ended() == 0
    assert engine.closed
    assert engine.has_stored_rest
    other = start(ScriptedEngine())
    other.api.sock.close()
    assert other.ended() == 0


def test_an_api_that_does_not_read_stops_the_steps_and_not_the_process(start: Start) -> None:
    engine = ScriptedEngine(output_bytes=1 << 20)
    api = start(engine).api
    api.send(Abort(RequestId("100")))
    deadline = time.monotonic() + 60
    num_steps = -1
    while engine.num_steps != num_steps or num_steps < MAX_UNSENT_BYTES // (1 << 20):
        assert time.monotonic() < deadline
        num_steps = engine.num_steps
        time.sleep(0.3)
    assert num_steps <= MAX_UNSENT_BYTES // (1 << 20) + 2
    for _ in range(5):
        api.read(100_000)
        time.sleep(0.02)
    assert engine.num_steps <= num_steps + 1  # half a message read makes room for one at most
    received = [api.receive() for _ in range(100)]
    assert [step.stats.step_id for step in received if isinstance(step, StepDone)] == [
        *range(1, 101)
    ]


def test_audits_run_while_idle_and_a_broken_law_is_told(start: Start) -> None:
    engine = ScriptedEngine(num_audits=3)
    api = start(engine).api
    told = api.receive()
    assert isinstance(told, StepDone)
    assert told.stats.broken_laws == ("a page leaked",)
    assert engine.num_steps == 0


def test_an_exception_in_a_step_ends_the_process_with_1(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ScriptedEngine(error=RuntimeError("no such luck"))
    process = start(engine)
    process.api.send(Abort(RequestId("1")))
    with pytest.raises(EOFError):
        process.api.receive()
    assert process.ended() == 1
    assert "no such luck" in caplog.text
    assert engine.closed


def test_a_load_tells_its_progress_and_why_it_failed() -> None:
    def make(options: EngineOptions, on_progress: OnProgress) -> SteppedEngine:
        on_progress("loading", 1, 2)
        raise ConfigError(f"no checkpoint at {options.model}")

    process = Started(make)
    process.api.greet()
    assert process.api.receive() == Loading("loading", 1, 2)
    assert process.api.receive() == StartFailed("no checkpoint at m")
    assert process.ended() == 2


def test_a_load_stops_when_the_api_is_gone() -> None:
    def make(options: EngineOptions, on_progress: OnProgress) -> SteppedEngine:
        while True:
            on_progress("loading", 1, 2)
            time.sleep(0.01)

    process = Started(make)
    process.api.greet()
    process.api.sock.close()
    assert process.ended() == 0


@pytest.mark.parametrize(
    "opening",
    [
        encode_frame(Hello(PROTOCOL_VERSION + 1, EngineOptions("m"))),
        encode_frame(Hello(PROTOCOL_VERSION)),
        encode_frame(Shutdown()),
        b"\xff" * 8,
    ],
    ids=["another version", "no options", "no hello", "garbage"],
)
def test_an_api_that_does_not_speak_the_protocol_is_left(
    opening: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    process = Started(lambda options, on_progress: ScriptedEngine())
    process.api.sock.sendall(opening)
    assert process.ended() == 2
    assert caplog.records
