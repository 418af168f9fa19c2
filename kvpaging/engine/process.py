"""The engine process: one thread that owns the device, the engine and one end of a socket.

The API starts it as `python -m kvpaging.engine.process FD PARENT_PID LOG_FORMAT` and says by
`Hello` what to load. What is slow (importing torch, loading weights) comes after the handshake, so
that the API can answer meanwhile. It ends by itself when the API is gone, however that went.
Exit codes: 0 told to end, or the API is gone; 1 crashed; 2 can't start with these options.

Knows nothing of HTTP and text, nor of why it was started again.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Final, Protocol, cast

import msgspec

from kvpaging.base import logs
from kvpaging.base.config import EngineConfig, EngineOptions
from kvpaging.base.errors import ConfigError
from kvpaging.cache.pins import PinState
from kvpaging.engine.connection import Connection, ConnectionClosed, ProtocolError
from kvpaging.engine.messages import (
    PROTOCOL_VERSION,
    CacheStats,
    EngineStats,
    GetCacheStats,
    GetPages,
    GetPins,
    Hello,
    Loading,
    PagePicture,
    PageState,
    PinList,
    Ready,
    Shutdown,
    StartFailed,
    StepDone,
    ToEngine,
)
from kvpaging.scheduling.events import Event
from kvpaging.scheduling.outputs import StepOutputs

_logger = logging.getLogger(__name__)

AUDIT_PAUSE_S: Final = 0.2
"""Between two slices of an idle audit, so that it costs no noticeable share of a core."""
LONGEST_SLEEP_S: Final = 3600.0
"""What ends in a year is more than a system call takes."""
LINGER_S: Final = 2.0
"""At most so long are the last messages sent, after everything else is over."""
PR_SET_PDEATHSIG: Final = 1

OnProgress = Callable[[str, int, int], None]
"""Stage, bytes done, bytes in all (0: unknown)."""


class SteppedEngine(Protocol):
    """What the loop needs of `kvpaging.engine.engine.Engine`."""

    config: EngineConfig

    @property
    def has_work(self) -> bool:
        """Some request is unfinished, or some bookkeeping is left."""

    @property
    def due_in_s(self) -> float | None:
        """In so many seconds a step is needed even if nothing happens; `None`: never."""

    def step(self, events: Sequence[Event]) -> StepOutputs:
        """Take the events in, and compute one step."""

    def stats(self) -> EngineStats:
        """State now and totals so far."""

    def pages(self) -> tuple[PageState, ...]:
        """Every page."""

    def cache_stats(self, query_id: int) -> CacheStats:
        """What the cache did so far."""

    def pins(self, tenant: str | None, name: str | None) -> tuple[PinState, ...]:
        """Those of a tenant, or of a name."""

    def audit_idle(self) -> bool:
        """Check a slice of the laws; say whether more is left to check."""

    def store_rest(self) -> None:
        """Let pages go down to the levels below that wait for it."""

    def close(self) -> None:
        """Give memory back."""


MakeEngine = Callable[[EngineOptions, OnProgress], SteppedEngine]


def load_engine(options: EngineOptions, on_progress: OnProgress) -> SteppedEngine:
    """Import what is slow and load the checkpoint. Raises `ConfigError`."""
    on_progress("importing torch", 0, 0)
    from kvpaging.engine.engine import Engine, make_recorder
    from kvpaging.execution.loading import load_executor

    config, executor = load_executor(options, on_progress)
    return Engine(config, executor, recorder=make_recorder(options, config, executor))


def run(sock: socket.socket, make_engine: MakeEngine = load_engine) -> int:
    """Serve the API at the other end of `sock` until it ends. Returns the exit code."""
    connection = Connection(sock, msgspec.msgpack.Decoder(ToEngine))
    try:
        connection.send(Hello(PROTOCOL_VERSION))
        engine = make_engine(_receive_options(connection), _progress_to(connection))
        try:
            gc.collect()
            gc.freeze()  # modules and weights live for ever: the collector need not look again
            connection.send(Ready(engine.config))
            _serve(connection, engine)
        finally:
            engine.close()
    except ConnectionClosed:
        return 0  # the API is gone, and this process is of no use without it
    except ConfigError as error:
        with contextlib.suppress(ConnectionClosed):
            connection.send(StartFailed(str(error)))
        return 2
    except ProtocolError as error:
        _logger.error("%s", error)
        return 2
    except Exception:  # whatever it was: this process ends, and the API learns it by that
        _logger.critical("the engine process ends after an unexpected error", exc_info=True)
        return 1
    finally:
        connection.close(LINGER_S)
    return 0


def _receive_options(connection: Connection[ToEngine]) -> EngineOptions:
    messages: list[ToEngine] = []
    while not messages:
        messages = connection.receive(None)
    hello = cast(Hello, messages[0])  # the connection lets nothing else come first
    _only_shutdown(messages[1:])
    if hello.options is None:
        raise ProtocolError("the API's Hello says nothing of what to load")
    return hello.options


def _progress_to(connection: Connection[ToEngine]) -> OnProgress:
    def report(stage: str, done_bytes: int = 0, total_bytes: int = 0) -> None:
        connection.send(Loading(stage, done_bytes, total_bytes))
        _only_shutdown(connection.receive(0))

    return report


def _only_shutdown(messages: Sequence[ToEngine]) -> None:
    """Before `Ready` the API may say that it ends, and nothing else."""
    for message in messages:
        if isinstance(message, Shutdown):
            raise ConnectionClosed("told to end while loading")
        raise ProtocolError(f"{type(message).__name__} before the engine was ready")


def _serve(connection: Connection[ToEngine], engine: SteppedEngine) -> None:
    """The loop: messages in, one step, outputs out; asleep while there is nothing to do."""
    events: list[Event] = []
    audit_left = True
    while True:
        timeout_s: float | None = None
        if not connection.is_congested:
            timeout_s = 0.0 if events or engine.has_work else engine.due_in_s
            if audit_left or timeout_s is not None:
                longest_s = AUDIT_PAUSE_S if audit_left else LONGEST_SLEEP_S
                timeout_s = longest_s if timeout_s is None else min(longest_s, timeout_s)
        for message in connection.receive(timeout_s):
            match message:
                case Shutdown():
                    engine.store_rest()
                    return
                case GetPages(query_id):
                    _send_pages(connection, engine, query_id)
                case GetCacheStats(query_id):
                    connection.send(engine.cache_stats(query_id))
                case GetPins(query_id, tenant, name):
                    limits = engine.config.scheduler
                    pins = engine.pins(tenant, name)
                    connection.send(
                        PinList(query_id, limits.page_size, limits.max_pinned_pages, pins)
                    )
                case Hello():
                    raise ProtocolError("a second Hello")
                case _:
                    events.append(message)
        if connection.is_congested:
            continue
        if events or engine.has_work or engine.due_in_s == 0:
            outputs = engine.step(events)
            events = []
            connection.send(StepDone(outputs, engine.stats()))
            audit_left = True
        elif audit_left:
            audit_left = _audit(connection, engine)


def _audit(connection: Connection[ToEngine], engine: SteppedEngine) -> bool:
    """Check one slice, and tell the API when that found a broken law."""
    known = engine.stats().broken_laws
    audit_left = engine.audit_idle()
    stats = engine.stats()
    if stats.broken_laws != known:
        connection.send(StepDone(StepOutputs(), stats))
    return audit_left


def _send_pages(connection: Connection[ToEngine], engine: SteppedEngine, query_id: int) -> None:
    page_size = engine.config.scheduler.page_size
    try:
        connection.send(PagePicture(query_id, page_size, engine.pages()))
    except ProtocolError as error:  # millions of pages: no reason to stop serving
        _logger.warning("the picture of the pages is not sent: %s", error)
        connection.send(PagePicture(query_id, page_size, ()))


def _die_with(parent_pid: int) -> None:
    """Make sure that this process never outlives the API, not even while it loads or computes.

    Elsewhere than on Linux the end of the socket's stream does that, at the next message.
    """
    if not sys.platform.startswith("linux"):
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        _logger.warning("prctl(PR_SET_PDEATHSIG) failed with errno %d", ctypes.get_errno())
    if os.getppid() != parent_pid:
        sys.exit(0)  # it was gone before the request above


def main(argv: Sequence[str], make_engine: MakeEngine = load_engine) -> int:
    """Entry point: `argv` is the socket's descriptor, the parent's process id, the log format."""
    fd, parent_pid, log_format = argv
    # Both reach the whole process group or control group; whether to end is the API's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _die_with(int(parent_pid))
    faulthandler.enable()
    logs.configure("json" if log_format == "json" else "console")
    return run(socket.socket(fileno=int(fd)), make_engine)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
