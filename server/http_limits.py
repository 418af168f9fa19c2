"""Bounds on what a connection may cost before, between and after its requests.

    IDLE -(first byte)-> HEADERS -(blank line)-> BODY -(its end)-> IDLE
      |                     |                      |
      keep_alive_s          header_timeout_s: 408  body_timeout_s: 408
                            max_header_bytes: 431

A connection that comes when `max_connections` are open gets 503; one whose client takes nothing of
an answer for `write_timeout_s` is cut off, which aborts its request. An offer to upgrade is
declined by serving the request without it. An answer that comes before its request was read to the
end is followed by a moment of listening: closing at once would take it back (RFC 9112, 9.6).

uvicorn has the idle time limit only. Works below ASGI, on uvicorn's own protocol class; knows
nothing of routes.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.errors import Dialect, ErrorAnswer
from server.observe.record import request_id_from

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application

_access_log: Final = logging.getLogger("server.access")


LINGER_S: Final = 1.0
LINGER_BYTES: Final = 1024 * 1024
"""What is still taken, and thrown away, of a request that was answered before its end."""


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


class _Closing:
    """A transport for the application's side, whose `close` is ours."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]):
        self._transport = transport
        self.close = close

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Phase(Enum):
    """What of a request is being read."""

    IDLE = auto()
    HEADERS = auto()
    BODY = auto()
    CLOSING = auto()
    """Nothing any more: the last answer is sent, and its reader has a moment to read it."""


class _HeadersTooLarge(Exception):
    """A signal out of the parser, no error of ours."""


class _LimitedHttpProtocol(HttpToolsProtocol):
    """One connection. At most one read timer and one write timer run at any time."""

    limits: ClassVar[HttpLimits]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._phase = _Phase.IDLE
        self._moved_on = False
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
                    headers={"Retry-After": "1"},
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
        if self._phase is _Phase.CLOSING:
            self._num_partial_bytes += len(data)
            if self._num_partial_bytes > LINGER_BYTES:
                self._close()
            return
        if self._phase is _Phase.IDLE:
            self._enter(_Phase.HEADERS)
        self._moved_on = False
        self._feed(data)
        if self._phase in (_Phase.HEADERS, _Phase.BODY) and not self._moved_on:
            # The parser speaks of a header only when it is whole, however long that grows; and
            # headers may follow a body too.
            self._num_partial_bytes += len(data)
            if self._num_partial_bytes > self.limits.max_header_bytes:
                self._refuse(self._headers_too_large())

    def _feed(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._decline(data[offer.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("this is not a valid HTTP request")

    def _decline(self, rest: bytes) -> None:
        """Read the request again as if no upgrade had been offered (RFC 9110, section 7.8).

        The parser would take `rest`, its body, for another protocol.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.send_400_response("CONNECT is for proxies, and this is none")
            return
        lines = [b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(token for token in tokens if token.lower() != b"upgrade")
            if name != b"upgrade":
                lines.append(name + b": " + value)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._feed(b"\r\n".join([*lines, b"", b""]) + rest)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._moved_on = True
        self._num_header_bytes = self._num_partial_bytes = 0
        self._enter(_Phase.HEADERS)

    def on_url(self, url: bytes) -> None:
        self._count_header_bytes(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_header_bytes(len(name) + len(value) + len(": \r\n"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # `_decline` begins again
        super().on_headers_complete()
        self.cycle.transport = cast(asyncio.Transport, _Closing(self.transport, self.close_after))
        self._num_partial_bytes = 0
        self._enter(_Phase.BODY)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        async def run(*connection: Any) -> None:
            await app(*connection)
            if cycle.response_started and not cycle.response_complete and not cycle.disconnected:
                # It gave up on a client that does not read, and has said so. uvicorn need not.
                cycle.disconnected = True
                self._close()

        super()._start_asgi_task(cycle, cast("ASGI3Application", run))

    def on_body(self, body: bytes) -> None:
        self._moved_on = True
        self._num_partial_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._enter(_Phase.IDLE)

    def on_response_complete(self) -> None:
        if self._phase is _Phase.CLOSING:
            return
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
            case _Phase.IDLE | _Phase.CLOSING:
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
        cycle = self.cycle
        is_answered = cycle is not None and cycle.response_started
        if is_answered and self._phase is not _Phase.BODY:
            is_answered = not cycle.response_complete  # complete, it was the request's before
        if not is_answered:
            request_id = request_id_from(None)
            self.transport.write(_raw_response(answer, request_id))
            # No route saw it, so this is its line in the log.
            _access_log.info(
                "- - %d", answer.status, extra={"request_id": request_id, "error": answer.code}
            )
        if is_answered or self not in self.connections:
            self._close()
        else:
            self._linger()

    def close_after(self) -> None:
        """Close after a whole answer; the application's side of a connection calls this."""
        if self._phase is _Phase.BODY:
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        """End our side, and close when the client ends its own, or after a moment."""
        self._cancel_timers()
        self._phase = _Phase.CLOSING
        self._num_partial_bytes = 0
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application's own answer would come too late
            self.cycle.message_event.set()
        self.flow.resume_reading()
        self.transport.write_eof()
        self._read_timer = self.loop.call_later(LINGER_S, self._close)

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
