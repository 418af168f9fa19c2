"""Server-sent events to one client, that may be slow or gone.

    frames --> [buffer, bounded] --> socket

The frames are made as fast as tokens come, never waiting for the client; only a large one waits
until those before it were taken. When the client leaves, does not read for `stall_s`, or falls
behind by more than the buffer, the source is closed, which aborts the request, and the connection
ends without an end mark. Knows no dialect and no tokens.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import ClientGone, SlowReader

DONE: Final = b"data: [DONE]\n\n"
"""The mark of a complete answer; TGI's dialect has none."""

LARGE_FRAME_BYTES: Final = 4096
"""A token's event is not so large; a scored prompt's is, and hundreds may come at once."""

_encode: Final = msgspec.json.Encoder().encode

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """How long a stream waits for its client."""

    stall_s: float = 30.0
    """For one piece to be taken."""
    max_buffered_bytes: int = 1024 * 1024
    """Made and not yet taken."""


def data_event(payload: object) -> bytes:
    """Give one event with a JSON payload."""
    return b"data: " + _encode(payload) + b"\n\n"


def error_event(body: object) -> bytes:
    """Give the event that ends a stream which can't be completed."""
    return b"event: error\ndata: " + _encode(body) + b"\n\n"


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do `work`, and cancel it when the client leaves. Raises `ClientGone` then.

    The request's body must have been read.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone("the client closed the connection")
    finally:
        await _cancel(task, watch)


class EventStream(Response):
    """A response of server-sent events.

    It begins with the first frame: what the source raises before that is raised here, and is
    answered with a status of its own. Afterwards the source itself must end with an error event.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        limits: StreamLimits,
        headers: Mapping[str, str] | None = None,
    ):
        self.status_code = 200
        self.background = None
        self._frames = frames
        self._limits = limits
        self.init_headers(
            {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"} | dict(headers or {})
        )
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the frames. Raises `ClientGone` or `SlowReader` when the client failed."""
        await until_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        buffer = _Buffer(self._limits.max_buffered_bytes)
        pump = asyncio.ensure_future(self._fill(buffer))
        try:
            piece = await buffer.take()
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while piece:
                await self._send_piece(send, piece, more=True)
                piece = await buffer.take()
            await self._send_piece(send, b"", more=False)
        finally:
            await _cancel(pump)

    async def _fill(self, buffer: _Buffer) -> None:
        try:
            async with aclosing(self._frames) as frames:
                async for frame in frames:
                    if len(frame) > LARGE_FRAME_BYTES:
                        await buffer.wait_until_empty()
                    buffer.put(frame)
        except Exception as error:  # noqa: BLE001 (handed on: `take` raises it)
            buffer.end(error)
        else:
            buffer.end(None)

    async def _send_piece(self, send: Send, body: bytes, *, more: bool) -> None:
        try:
            async with asyncio.timeout(self._limits.stall_s):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError as error:
            raise SlowReader(f"the client took nothing for {self._limits.stall_s:g} s") from error


class _Buffer:
    """Frames between the one who makes them and the one who sends them."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._frames: deque[bytes] = deque()
        self._num_bytes = 0
        self._ended = False
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    async def wait_until_empty(self) -> None:
        """Wait until all that was put was taken."""
        await self._is_empty.wait()

    def put(self, frame: bytes) -> None:
        """Add a frame. Raises `SlowReader` when too much waits to be taken."""
        if self._frames and self._num_bytes + len(frame) > self._max_bytes:
            raise SlowReader(f"the client is {self._num_bytes} bytes behind")
        self._frames.append(frame)
        self._num_bytes += len(frame)
        self._is_empty.clear()
        self._news.set()

    def end(self, error: Exception | None) -> None:
        """Say that nothing more comes, and why."""
        self._ended, self._error = True, error
        self._news.set()

    async def take(self) -> bytes:
        """Give everything that waits, `b""` at the end. Raises what the source raised."""
        await self._news.wait()
        self._news.clear()
        piece = b"".join(self._frames)
        self._frames.clear()
        self._num_bytes = 0
        self._is_empty.set()
        if self._ended:
            if isinstance(self._error, SlowReader) or (not piece and self._error is not None):
                raise self._error
            self._news.set()
        return piece


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    """End the tasks and wait for them; what they raise was seen or does not matter any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
