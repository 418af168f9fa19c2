"""The client that owns an engine process: starts it, speaks with it, and starts it again.

    LOADING -> READY <-> STALLED
       ^         |
       +- DEAD <-+    every open request has failed with EngineDied

It gives up, and `given_up` says why, when an engine refuses its options, ends before any engine was
ready, or crashes `max_crashes` times in a row.

Everything runs on the event loop's thread and nothing waits for the engine. What it says is handed
to each request's own bounded queue, so that a slow reader loses its request and delays nobody.
Knows no text and no HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, assert_never, cast

from kvpaging.base.clock import Clock, monotonic
from kvpaging.base.config import EngineConfig
from kvpaging.base.errors import (
    BadRequest,
    ConfigError,
    EngineDied,
    KvPagingError,
    Overloaded,
    PromptTooLong,
)
from kvpaging.base.ids import RequestId
from kvpaging.engine.connection import encode_frame
from kvpaging.engine.messages import (
    Answer,
    CacheStats,
    EngineStats,
    FromEngine,
    GetCacheStats,
    GetPages,
    GetPins,
    Hello,
    Loading,
    PagePicture,
    PinList,
    Query,
    Ready,
    Shutdown,
    StartFailed,
    StepDone,
    ToEngine,
)
from kvpaging.scheduling.events import Abort, Arrival, Finish, Flush, Unpin
from kvpaging.scheduling.outputs import Flushed, Rejection, SequenceOutput
from kvpaging.scheduling.request import Request
from server.client import EngineState, EngineStatus, ShuttingDown
from server.engine_process import EngineLink, EngineProcess, describe_exit
from server.open_requests import Stream, Suspects

_logger = logging.getLogger(__name__)

MAX_UNSENT_BYTES: Final = 64 * 1024 * 1024
"""What may wait to be written to an engine that does not read, before requests are refused."""
NUM_RATED_COMPLETIONS: Final = 64
"""So many completions tell the rate at which the queue drains."""


@dataclass(frozen=True, slots=True)
class SupervisorLimits:
    """Where patience ends."""

    max_crashes: int = 3
    """So many crashes in a row, and the engine is not started again."""
    steady_s: float = 60.0
    """A crash of an engine that was ready for so long is the first of a new row."""
    stall_s: float = 60.0
    """No step for so long while requests are open: stalled."""
    hang_s: float = 180.0
    """And for so long: the engine process is killed, and another one started."""
    query_s: float = 5.0
    """For the answer to `pages`, `cache_stats` or `pins`."""
    flush_s: float = 60.0
    """For emptying levels: half a minute for a remote one, after what is on its way."""
    max_pending_outputs: int = 4096
    """So many outputs behind, a reader loses its request."""
    close_s: float = 7.5
    """The time to end by itself, writing to lower levels included (`page_mover.CLOSE_S`); after
    that the engine process is killed. With `launch.CLOSING_S` it is less than the 10 s that Docker
    leaves between SIGTERM and SIGKILL."""


class EngineSupervisor:
    """An `EngineClient` whose engine lives in a process of its own.

    `spawn` starts an engine process; `on_loading` is told how far a load is.
    """

    def __init__(
        self,
        spawn: Callable[[], EngineProcess],
        *,
        limits: SupervisorLimits | None = None,
        on_loading: Callable[[Loading], None] | None = None,
        clock: Clock = monotonic,
    ):
        self._spawn = spawn
        self._limits = limits or SupervisorLimits()
        self._on_loading = on_loading
        self._clock = clock

        self._process: EngineProcess | None = None
        self._transport: asyncio.Transport | None = None
        self._burial: asyncio.Task[None] | None = None
        self._closed = False

        self._state = EngineState.LOADING
        self._detail = "starting the engine process"
        self._refusal: str | None = None
        self._config: EngineConfig | None = None
        self._stats = EngineStats()
        self._ready_at: float | None = None
        self._progress_at = clock()
        self._hang_timer: asyncio.TimerHandle | None = None
        self._num_crashes = 0
        self._num_restarts = 0

        self._streams: dict[RequestId, Stream] = {}
        self._num_sent_since_step = 0
        self._queries: dict[int, asyncio.Future[Answer | Flushed]] = {}
        self._query_ids = itertools.count()
        self._suspects = Suspects()
        self._completions: deque[float] = deque(maxlen=NUM_RATED_COMPLETIONS)

        self._first_ready: asyncio.Future[EngineConfig] | None = None
        self.given_up: asyncio.Future[KvPagingError] | None = None
        """Set by `start`. Has a result when no engine will run any more: why."""

    # What the routes call (`EngineClient`).

    def status(self) -> EngineStatus:
        """The state now, without waiting."""
        state, detail = self._state, self._detail
        stalled_s = self._clock() - self._progress_at
        if state is EngineState.READY and self._streams and stalled_s > self._limits.stall_s:
            state = EngineState.STALLED
            detail = f"no step for {stalled_s:.0f} s with {len(self._streams)} requests open"
        return EngineStatus(state, detail, self._config, self._stats, self._num_restarts)

    async def submit(self, request: Request) -> AsyncGenerator[SequenceOutput, None]:
        """See `EngineClient.submit`. Nothing is sent before the first item is asked for."""
        self._admit(request)
        stream = Stream(request, self._limits.max_pending_outputs)
        self._open(stream)
        try:
            while (output := await stream.take()) is not None:
                yield output
        finally:
            self._abort(stream)

    def finish(self, request_id: RequestId, output_index: int, num_tokens: int) -> None:
        """See `EngineClient.finish`."""
        if request_id in self._streams:
            self._send(Finish(request_id, output_index, num_tokens))

    async def pages(self) -> PagePicture:
        """Every page as it is now. Raises `EngineDied`, also when it gives no answer."""
        return cast(PagePicture, await self._ask(GetPages, self._limits.query_s))

    async def cache_stats(self) -> CacheStats:
        """What the cache did so far. Raises `EngineDied`, also when it gives no answer."""
        return cast(CacheStats, await self._ask(GetCacheStats, self._limits.query_s))

    async def pins(self, tenant: str | None = None, name: str | None = None) -> PinList:
        """See `EngineClient.pins`. Raises `EngineDied` also when it gives no answer."""
        query = partial(GetPins, tenant=tenant, name=name)
        return cast(PinList, await self._ask(query, self._limits.query_s))

    def unpin(self, request_id: RequestId) -> None:
        """See `EngineClient.unpin`. With an engine that is gone its pins are gone too."""
        if self._state is EngineState.READY:
            self._send(Unpin(request_id))

    async def flush_cache(self, level: str | None) -> Flushed:
        """See `EngineClient.flush_cache`. Raises `EngineDied` also when it takes too long."""
        flush = partial(Flush, level=level)
        return cast(Flushed, await self._ask(flush, self._limits.flush_s))

    async def _ask(
        self, query: Callable[[int], Query | Flush], timeout_s: float
    ) -> Answer | Flushed:
        if self._state is not EngineState.READY:
            raise EngineDied(f"the engine is {self._state}: {self._detail}")
        query_id = next(self._query_ids)
        answer: asyncio.Future[Answer | Flushed] = asyncio.get_running_loop().create_future()
        self._queries[query_id] = answer
        try:
            self._send(query(query_id))
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise EngineDied(f"the engine did not answer within {timeout_s:g} s") from None
        finally:
            del self._queries[query_id]

    async def close(self) -> None:
        """End the engine; open requests fail with `EngineDied`. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._hang_timer is not None:
            self._hang_timer.cancel()
        if self._burial is not None:
            self._burial.cancel()
            await asyncio.gather(self._burial, return_exceptions=True)
        self._fail_all(ShuttingDown())
        if self._process is not None:
            if self._state is EngineState.READY:
                self._send(Shutdown())
            else:
                self._process.popen.kill()  # it may load for long before it reads
            await self._process.reap(self._limits.close_s)
        if self._transport is not None:
            self._transport.abort()
        self._state, self._detail = EngineState.DEAD, "closed"

    # What the process start calls.

    async def start(self, process: EngineProcess | None = None) -> None:
        """Adopt `process`, or spawn one, and begin to listen to it. Call once."""
        loop = asyncio.get_running_loop()
        self._first_ready, self.given_up = loop.create_future(), loop.create_future()
        await self._adopt(process or self._spawn())

    async def ready(self) -> EngineConfig:
        """Wait until an engine is ready.

        Raises `ConfigError` when it can't start as asked, `EngineDied` when it crashed instead.
        """
        if self._first_ready is None or self.given_up is None:
            raise RuntimeError("start() comes first")
        ends: set[asyncio.Future[Any]] = {self._first_ready, self.given_up}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if self.given_up.done():
            raise self.given_up.result()
        return self._first_ready.result()

    @property
    def num_open_requests(self) -> int:
        """Requests that the engine has not completed."""
        return len(self._streams)

    # One engine process's life.

    async def _adopt(self, process: EngineProcess) -> None:
        self._process = process
        self._transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: EngineLink(self._take, self._lose), sock=process.sock
        )

    def _take(self, message: FromEngine) -> None:
        match message:
            case StepDone():
                self._take_step(message)
            case PagePicture() | CacheStats() | PinList():
                self._answer(message)
            case Loading():
                self._detail = _describe_loading(message)
                if self._on_loading is not None:
                    self._on_loading(message)
            case Ready():
                self._state, self._detail = EngineState.READY, "serving"
                self._config = message.config
                self._ready_at = self._progress_at = self._clock()
                if self._first_ready is not None and not self._first_ready.done():
                    self._first_ready.set_result(message.config)
            case StartFailed():
                self._refusal = message.message
            case Hello():
                pass  # the link has compared versions
            case _:
                assert_never(message)

    def _answer(self, answer: Answer | Flushed) -> None:
        asked = self._queries.get(answer.query_id)
        if asked is not None and not asked.done():
            asked.set_result(answer)

    def _lose(self, fault: str) -> None:
        """The socket to the engine is closed: it crashed, ended, or broke the protocol."""
        if self._closed or self._process is None:
            return
        died_after_s = 0.0 if self._ready_at is None else self._clock() - self._ready_at
        was_ready, self._ready_at = self._ready_at is not None, None
        self._state, self._detail = EngineState.DEAD, "the engine process has ended"
        self._stats = EngineStats()
        self._num_sent_since_step = 0
        self._suspects.accuse(stream.request for stream in self._streams.values())
        self._fail_all(EngineDied("the engine process ended under this request"))
        for asked in self._queries.values():
            if not asked.done():
                asked.set_exception(EngineDied("the engine process ended under this question"))
        if was_ready and died_after_s >= self._limits.steady_s:
            self._num_crashes = 0
        self._num_crashes += 1
        self._burial = asyncio.create_task(self._bury(self._process, fault))

    async def _bury(self, process: EngineProcess, fault: str) -> None:
        """Learn how it ended, then start the next one or give up."""
        exit_code = await process.reap(self._limits.close_s)
        how = fault or describe_exit(exit_code)
        self._detail = f"the engine process ended: {how}"
        if self._refusal is not None:
            self._give_up(ConfigError(self._refusal))
        elif self._first_ready is None or not self._first_ready.done():
            self._give_up(EngineDied(f"the engine process ended before it was ready: {how}"))
        elif self._num_crashes >= self._limits.max_crashes:
            self._give_up(
                EngineDied(
                    f"the engine process crashed {self._num_crashes} times, none of them "
                    f"{self._limits.steady_s:g} s after it was ready; the last time: {how}"
                )
            )
        else:
            _logger.error("the engine process ended (%s); starting another", how)
            self._num_restarts += 1
            self._state, self._detail = EngineState.LOADING, "starting again after a crash"
            try:
                await self._adopt(self._spawn())
            except OSError as error:
                self._give_up(EngineDied(f"the engine process can't be started again: {error}"))

    def _give_up(self, error: KvPagingError) -> None:
        self._state, self._detail = EngineState.DEAD, str(error)
        if self.given_up is not None and not self.given_up.done():
            self.given_up.set_result(error)

    def _send(self, message: ToEngine) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode_frame(message))

    # Requests.

    def _admit(self, request: Request) -> None:
        """Refuse at the door what can't or must not be served; the queue's bound included."""
        if self._closed:
            raise ShuttingDown
        if self._state is not EngineState.READY or self._config is None:
            raise EngineDied(f"the engine is {self._state}: {self._detail}; try again later")
        if request.request_id in self._streams:
            raise BadRequest(
                f"a request with the id {request.request_id} is running", code="duplicate_id"
            )
        if self._suspects.is_banned(request):
            raise BadRequest(
                "the engine crashed twice while it computed this request, so it is not tried "
                "again; change it, or restart the server",
                code="crashed_engine",
            )
        scheduler, stats = self._config.scheduler, self._stats
        # What was sent since the last step may run at once if nothing waits and rows are free.
        num_free = 0 if stats.num_waiting else max(0, scheduler.max_num_seqs - stats.num_running)
        num_waiting = stats.num_waiting + max(0, self._num_sent_since_step - num_free)
        if num_waiting >= scheduler.max_num_waiting:
            raise self._overloaded(
                f"{num_waiting} requests are waiting, and the limit is {scheduler.max_num_waiting}"
            )
        if self._transport is not None:
            unsent = self._transport.get_write_buffer_size()
            if unsent > MAX_UNSENT_BYTES:
                raise self._overloaded("the engine is behind with reading its requests")

    def _open(self, stream: Stream) -> None:
        if not self._streams:
            self._progress_at = self._clock()  # until now there was nothing to progress with
        self._send(Arrival(stream.request))
        self._streams[stream.request.request_id] = stream
        self._num_sent_since_step += 1
        if self._hang_timer is None:
            self._watch(self._limits.hang_s)

    def _watch(self, delay_s: float) -> None:
        self._hang_timer = asyncio.get_running_loop().call_later(delay_s, self._end_if_hung)

    def _end_if_hung(self) -> None:
        """Kill an engine without progress: its end is like any other. Idle, nothing is watched."""
        self._hang_timer = None
        if not self._streams or self._process is None:
            return
        stalled_s = self._clock() - self._progress_at
        if stalled_s < self._limits.hang_s:
            self._watch(self._limits.hang_s - stalled_s)
            return
        _logger.error("no step for %.0f s; killing the engine process", stalled_s)
        self._process.popen.kill()

    def _abort(self, stream: Stream) -> None:
        """The reader is gone. Does nothing if the engine was done with the request."""
        request_id = stream.request.request_id
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self._send(Abort(request_id))

    def _take_step(self, step: StepDone) -> None:
        self._stats = step.stats
        self._progress_at = self._clock()
        self._num_sent_since_step = 0
        for flushed in step.outputs.flushed:
            self._answer(flushed)
        for rejection in step.outputs.rejections:
            stream = self._streams.pop(rejection.request_id, None)
            if stream is not None:
                stream.fail(self._error_of(rejection))
        for output in step.outputs.outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:  # else it was aborted meanwhile
                self._deliver(stream, output)

    def _deliver(self, stream: Stream, output: SequenceOutput) -> None:
        if not stream.put(output):
            self._abort(stream)
            stream.fail(
                EngineDied(
                    f"the request was aborted: its reader is {self._limits.max_pending_outputs} "
                    "outputs behind"
                )
            )
        elif stream.is_complete:
            del self._streams[output.request_id]
            self._suspects.clear(stream.request)
            self._completions.append(self._progress_at)

    def _fail_all(self, error: EngineDied) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(error)
        for answer in self._queries.values():
            if not answer.done():
                answer.set_exception(error)

    def _error_of(self, rejection: Rejection) -> KvPagingError:
        """The error that the engine would have raised, had it been asked in this process."""
        match rejection.code:
            case "overloaded":
                return self._overloaded(rejection.message)
            case "context_length_exceeded":
                return PromptTooLong(rejection.message, param=rejection.param or "prompt")
            case code:
                return BadRequest(rejection.message, param=rejection.param, code=code)

    def _overloaded(self, message: str) -> Overloaded:
        """Advise to come back when the queue has drained, at the rate of the last completions."""
        retry_after_s = 1.0
        if len(self._completions) > 1:
            elapsed_s = max(self._clock() - self._completions[0], 1e-3)
            rate = (len(self._completions) - 1) / elapsed_s
            retry_after_s = min(max(self._stats.num_waiting / rate, 1.0), 60.0)
        return Overloaded(message, retry_after_s=retry_after_s)


def _describe_loading(message: Loading) -> str:
    if not message.total_bytes:
        return message.stage
    return f"{message.stage}, {100 * message.done_bytes // message.total_bytes} %"
