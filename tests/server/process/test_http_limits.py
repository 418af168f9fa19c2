"""The limits on connections, with raw sockets against a real uvicorn."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from socket import AF_INET, SO_RCVBUF, SOCK_STREAM, SOL_SOCKET, create_connection, socket
from typing import Any

import pytest
import uvicorn
from http_app import wait_for

from server.http_limits import HttpLimits, limited_protocol

Message = MutableMapping[str, Any]
QUICK = HttpLimits(
    header_timeout_s=0.5,
    body_timeout_s=0.5,
    write_timeout_s=0.5,
    max_header_bytes=2048,
)
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


class Application:
    """`/` echoes the body; `/slow` answers after 1.2 s; `/flood` sends without end.

    `/early` refuses without a look at the body, `/live` answers so.
    """

    def __init__(self) -> None:
        self.num_floods_ended = 0

    async def __call__(
        self, scope: Message, receive: Callable[[], Any], send: Callable[[Message], Any]
    ) -> None:
        if scope["path"] in ("/early", "/live"):
            await self._answer_early(scope["path"] == "/live", send)
            return
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message["body"]
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/slow":
            await asyncio.sleep(1.2)
        if scope["path"] == "/flood":
            await self._flood(receive, send)
        await send({"type": "http.response.body", "body": body or b"hello"})

    async def _answer_early(self, is_well: bool, send: Callable[[Message], Any]) -> None:
        headers = [(b"content-length", b"5"), *([] if is_well else [(b"connection", b"close")])]
        status = 200 if is_well else 413
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"early"})

    async def _flood(self, receive: Callable[[], Any], send: Callable[[Message], Any]) -> None:
        gone = asyncio.ensure_future(receive())
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await asyncio.sleep(0)
        self.num_floods_ended += 1


@contextmanager
def listening(app: Application, limits: HttpLimits, keep_alive_s: float = 0.5) -> Iterator[int]:
    listener = socket(AF_INET, SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        http=limited_protocol(limits),
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_keep_alive=keep_alive_s,  # type: ignore[arg-type]
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: server.run([listener]), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


@pytest.fixture(scope="module")
def app() -> Application:
    return Application()


@pytest.fixture(scope="module")
def hasty(app: Application) -> Iterator[int]:
    """A port where patience ends soon: for what runs into a limit of time."""
    with listening(app, QUICK) as port:
        yield port


@pytest.fixture(scope="module")
def port(app: Application) -> Iterator[int]:
    """A port where no limit of time is met, however slow the machine."""
    with listening(app, HttpLimits(max_header_bytes=2048), keep_alive_s=60) as port:
        yield port


def connect(port: int) -> socket:
    return create_connection(("127.0.0.1", port), timeout=60)


def read_all(sock: socket) -> bytes:
    data = b""
    while chunk := sock.recv(65536):
        data += chunk
    return data


def read_one(sock: socket) -> bytes:
    """One chunked answer, on a connection that stays open."""
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        data += sock.recv(65536)
    return data


def is_served(port: int) -> bool:
    with connect(port) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        return read_all(sock).startswith(b"HTTP/1.1 200")


def error_code(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def test_a_request_within_the_limits_is_answered_and_the_connection_kept(port: int) -> None:
    with connect(port) as sock:
        for _ in range(2):
            sock.sendall(GET)
            assert read_one(sock).startswith(b"HTTP/1.1 200")


def test_headers_that_drip_end_in_408(hasty: int) -> None:
    begin = time.monotonic()
    with connect(hasty) as sock:
        answer = b""
        sock.settimeout(0.05)
        sock.sendall(b"GET / HTTP/1.1\r\n")
        while not answer and time.monotonic() - begin < 60:
            try:
                answer = sock.recv(65536)
            except TimeoutError:
                sock.sendall(b"x: y\r\n")
        assert error_code(answer) == (408, "request_timeout")
        assert time.monotonic() - begin > 0.4


def test_a_body_that_does_not_come_ends_in_408(hasty: int) -> None:
    with connect(hasty) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nabc")
        assert error_code(read_all(sock)) == (408, "request_timeout")


def test_idle_connections_are_closed(hasty: int) -> None:
    begin = time.monotonic()
    with connect(hasty) as silent:
        assert read_all(silent) == b""
        assert time.monotonic() - begin > 0.4
    with connect(hasty) as used:
        used.sendall(GET)
        assert read_all(used).startswith(b"HTTP/1.1 200")


def test_stray_line_ends_do_not_keep_a_connection(hasty: int) -> None:
    with connect(hasty) as sock:
        sock.sendall(b"\r\n")
        read_all(sock)


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nx: " + b"y" * 4000 + b"\r\n\r\n",
        b"GET /" + b"y" * 4000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 700 + b"\r\n",
    ],
    ids=["one header", "the path", "many headers"],
)
def test_large_headers_end_in_431(port: int, head: bytes) -> None:
    with connect(port) as sock:
        sock.sendall(head)
        assert error_code(read_all(sock)) == (431, "headers_too_large")


def test_a_header_without_end_ends_in_431(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nx: ")
        for _ in range(3):
            time.sleep(0.02)
            sock.sendall(b"y" * 1000)
        assert error_code(read_all(sock)) == (431, "headers_too_large")


@pytest.mark.parametrize("trailer", [b"x: y\r\n" * 100, b"x: " + b"y" * 1000])
def test_headers_behind_a_body_are_counted_too(port: int, trailer: bytes) -> None:
    with connect(port) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        sock.sendall(b"1\r\na\r\n0\r\n")
        for _ in range(4):
            time.sleep(0.02)
            sock.sendall(trailer)
        assert error_code(read_all(sock)) == (431, "headers_too_large")


def test_a_body_in_tiny_chunks_is_no_header(app: Application) -> None:
    with listening(app, HttpLimits(max_header_bytes=100)) as port, connect(port) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(20):
            for piece in (b"1", b"\r\n", b"a\r\n"):
                time.sleep(0.002)
                sock.sendall(piece)
        sock.sendall(b"0\r\n\r\n")
        assert read_one(sock).endswith(b"a" * 20 + b"\r\n0\r\n\r\n")


UPGRADE = (
    b"POST / HTTP/1.1\r\nhost: x\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\n"
    b"http2-settings: AAMAAABk\r\n"
)


@pytest.mark.parametrize("length", [b"content-length: 5\r\n", b"transfer-encoding: chunked\r\n"])
@pytest.mark.parametrize("num_pieces", [1, 2, 300])
def test_an_offer_to_upgrade_is_declined_and_the_body_read(
    port: int, length: bytes, num_pieces: int, caplog: pytest.LogCaptureFixture
) -> None:
    body = b"abcde" if b"content" in length else b"5\r\nabcde\r\n0\r\n\r\n"
    request = UPGRADE + length + b"\r\n" + body
    size = -(-len(request) // num_pieces)
    with connect(port) as sock:
        for _ in range(2):  # and the connection goes on
            for start in range(0, len(request), size):
                sock.sendall(request[start : start + size])
            assert read_one(sock).endswith(b"abcde\r\n0\r\n\r\n")
        sock.sendall(UPGRADE + b"\r\n")
        assert read_one(sock).endswith(b"hello\r\n0\r\n\r\n")
    assert not caplog.records


def test_headers_of_an_upgrade_are_counted_once_not_never(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(UPGRADE + b"x: " + b"y" * 1500 + b"\r\n\r\n")
        assert read_one(sock).startswith(b"HTTP/1.1 200")
        sock.sendall(UPGRADE + b"x: " + b"y" * 2500 + b"\r\n\r\n")
        assert error_code(read_all(sock)) == (431, "headers_too_large")


def test_connect_is_refused(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(b"CONNECT example.com:80 HTTP/1.1\r\nhost: example.com:80\r\n\r\n")
        assert error_code(read_all(sock)) == (400, "invalid_http")


@pytest.mark.parametrize("kind", ["by us", "by the application"])
def test_an_early_answer_is_not_taken_back_by_a_reset(port: int, kind: str) -> None:
    head = b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 900000\r\n"
    if kind == "by us":
        head += b"x: " + b"y" * 4000 + b"\r\n"
    with connect(port) as sock:
        sock.sendall(head + b"\r\n")
        for _ in range(8):
            sock.sendall(b"z" * 100_000)
            time.sleep(0.01)
        answer = read_all(sock)
        assert int(answer.split()[1]) == (431 if kind == "by us" else 413)


def test_whoever_sends_on_after_an_answer_is_cut_off(port: int) -> None:
    with connect(port) as sock, pytest.raises(ConnectionError):  # noqa: PT012
        sock.sendall(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 99000000\r\n\r\n")
        for _ in range(990):
            sock.sendall(b"z" * 100_000)


def test_an_answered_request_whose_body_does_not_come_is_not_answered_again(hasty: int) -> None:
    with connect(hasty) as sock:
        sock.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\na")
        answer = read_all(sock)
    assert answer.count(b"HTTP/1.1") == 1
    assert answer.startswith(b"HTTP/1.1 200")


def test_what_is_not_http_ends_in_400(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert error_code(read_all(sock)) == (400, "invalid_http")


def test_one_connection_too_many_gets_503(app: Application) -> None:
    limits = HttpLimits(max_connections=4)
    with listening(app, limits, keep_alive_s=60) as port:
        held = [connect(port) for _ in range(limits.max_connections)]
        for sock in held:
            sock.sendall(GET)
            read_one(sock)
        with connect(port) as sock:
            answer = read_all(sock)
            assert error_code(answer) == (503, "too_many_connections")
            assert b"\r\nRetry-After: 1\r\n" in answer
        held.pop().close()
        wait_for(lambda: is_served(port))
        for sock in held:
            sock.close()


def test_a_long_answer_is_not_cut_by_the_limits_on_reading(hasty: int) -> None:
    with connect(hasty) as sock:
        sock.sendall(b"GET /slow HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert read_all(sock).endswith(b"hello\r\n0\r\n\r\n")


def test_a_pipelined_request_waits_behind_a_long_answer(hasty: int) -> None:
    with connect(hasty) as sock:
        sock.sendall(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n" + GET)
        assert read_all(sock).count(b"HTTP/1.1 200") == 2


def test_half_a_pipelined_request_is_timed_once_it_is_its_turn(hasty: int) -> None:
    with connect(hasty) as sock:
        sock.sendall(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\nGET / HT")
        answer = read_all(sock)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"hello" in answer
        assert b"408" in answer


def test_whoever_does_not_read_is_cut_off(app: Application, hasty: int) -> None:
    with socket(AF_INET, SOCK_STREAM) as sock:
        sock.setsockopt(SOL_SOCKET, SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", hasty))
        sock.sendall(b"GET /flood HTTP/1.1\r\nhost: x\r\n\r\n")
        wait_for(lambda: app.num_floods_ended)
