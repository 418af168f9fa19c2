"""Bounds on what a connection may cost before, between and after its requests.

    IDLE -(first byte)-> HEADERS -(blank line)-> BODY -(its end)-> IDLE
      |                     |                      |
      keep_alive_s          header_timeout_s: 408  body_timeout_s: 408
                            max_header_bytes: 431

A connection that comes when `max_connections` are open gets 503; one whose client takes nothing of
an answer for `write_timeout_s` is cut off, which aborts its request. uvicorn has the idle time
limit only. Works below ASGI, on uvicorn's own protocol class; knows nothing of routes.
"""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass
from enum import Enum, auto
from http import HTTPStatus
from typing import Any, ClassVar, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.errors import Dialect, ErrorAnswer
from server.observe.record import request_id_from

_access_log: Final = logging.getLogger("server.access")


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """The bounds; `keep_alive_s` is uvicorn's own setting."""

    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    write_timeout_s: float = 30.0
    max_header_bytes: int = 32 * 1024
    """Request line and headers together."""
    max_connections: int = 4096


def limited_protocol(limits: HttpLimits) -> type[HttpToolsProtocol]:
    """Give the class for uvicorn's `http=` setting."""
    return type("LimitedHttpProtocol", (_LimitedHttpProtocol,), {"limits": limits})


class _Phase(Enum):
    """What of a request is being read."""

    IDLE = auto()
    HEADERS = auto()
    BODY = auto()


class _HeadersTooLarge(Exception):
    """A signal out of the parser, no error of ours."""


class _LimitedHttpProtocol(HttpToolsProtocol):
    """One connection. At most one read timer and one write timer run at any time."""

    limits: ClassVar[HttpLimits]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._phase = _Phase.IDLE
        self._began_in_chunk = False
        self._num_header_bytes = 0
        self._num_partial_bytes = 0
        self._refusal: ErrorAnswer | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # Connections.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self.limits.max_connections:
            self.transport = transport
            self._refuse(
                ErrorAnswer(
                    503,
                    f"{self.limits.max_connections} connections are open, which is the limit",
                    "too_many_connections",
                )
            )
            return
        super().connection_made(transport)
        # A client that connects and sends nothing is as idle as one between two requests.
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    # Reading.

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._phase is _Phase.IDLE:
            self._enter(_Phase.HEADERS)
        self._began_in_chunk = False
        super().data_received(data)
        if self._phase is _Phase.HEADERS and not self._began_in_chunk:
            # The parser speaks of a header only when it is whole, however long that grows.
            self._num_partial_bytes += len(data)
            if self._num_partial_bytes > self.limits.max_header_bytes:
                self._refuse(self._headers_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._began_in_chunk = True
        self._num_header_bytes = self._num_partial_bytes = 0
        self._enter(_Phase.HEADERS)

    def on_url(self, url: bytes) -> None:
        self._count_header_bytes(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_header_bytes(len(name) + len(value) + len(": \r\n"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._enter(_Phase.BODY)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._enter(_Phase.IDLE)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._start_read_timer()  # for a request that was pipelined behind this answer
        if self._phase is not _Phase.IDLE:
            self._unset_keepalive_if_required()

    def _count_header_bytes(self, num_bytes: int) -> None:
        self._num_header_bytes += num_bytes
        if self._num_header_bytes > self.limits.max_header_bytes:
            self._refusal = self._headers_too_large()
            raise _HeadersTooLarge  # the parser stops, and `send_400_response` is called

    def _headers_too_large(self) -> ErrorAnswer:
        return ErrorAnswer(
            431,
            f"request line and headers are over the limit of {self.limits.max_header_bytes} bytes",
            "headers_too_large",
        )

    # Time.

    def _enter(self, phase: _Phase) -> None:
        self._phase = phase
        self._start_read_timer()

    def _start_read_timer(self) -> None:
        """Limit the phase's time, unless we ourselves hold it up behind an unfinished answer."""
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None
        match self._phase:
            case _Phase.IDLE:
                return
            case _Phase.HEADERS:
                is_held_up = self.cycle is not None and not self.cycle.response_complete
                limit_s = self.limits.header_timeout_s
            case _Phase.BODY:
                is_held_up = bool(self.pipeline)
                limit_s = self.limits.body_timeout_s
        if not is_held_up and not self.transport.is_closing():
            self._read_timer = self.loop.call_later(limit_s, self._read_took_too_long, limit_s)

    def _read_took_too_long(self, limit_s: float) -> None:
        what = "headers" if self._phase is _Phase.HEADERS else "body"
        self._refuse(
            ErrorAnswer(408, f"the request's {what} took over {limit_s:g} s", "request_timeout")
        )

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # Endings.

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser refused; uvicorn calls this."""
        self._refuse(self._refusal or ErrorAnswer(400, msg, "invalid_http"))

    def _refuse(self, answer: ErrorAnswer) -> None:
        """Answer without the application and close; only close in the middle of an answer."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            request_id = request_id_from(None)
            self.transport.write(_raw_response(answer, request_id))
            # No route saw it, so this is its line in the log.
            _access_log.info(
                "- - %d", answer.status, extra={"request_id": request_id, "error": answer.code}
            )
        self._close()

    def _close(self) -> None:
        """Close, at the latest after `write_timeout_s` whether or not the client reads the rest."""
        self._cancel_timers()
        if not self.transport.is_closing():
            self.transport.close()
            self.loop.call_later(self.limits.write_timeout_s, self.transport.abort)

    def _cancel_timers(self) -> None:
        for timer in (self._read_timer, self._write_timer, self.timeout_keep_alive_task):
            if timer is not None:
                timer.cancel()
        self._read_timer = self._write_timer = self.timeout_keep_alive_task = None


def _raw_response(answer: ErrorAnswer, request_id: str) -> bytes:
    body = json.dumps(answer.body_in(Dialect.NATIVE)).encode()
    head = (
        f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}\r\n"
        "content-type: application/json\r\n"
        f"x-request-id: {request_id}\r\n"
        f"content-length: {len(body)}\r\n"
        + "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
        + "connection: close\r\n\r\n"
    )
    return head.encode("ascii") + body
