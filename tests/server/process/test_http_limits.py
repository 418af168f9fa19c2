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

from server.http_limits import HttpLimits, limited_protocol

Message = MutableMapping[str, Any]
QUICK = HttpLimits(
    header_timeout_s=0.3,
    body_timeout_s=0.3,
    write_timeout_s=0.3,
    max_header_bytes=2048,
    max_connections=4,
)
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


class Application:
    """`/` echoes the body; `/slow` answers after 0.8 s; `/flood` sends without end."""

    def __init__(self) -> None:
        self.num_floods_ended = 0

    async def __call__(
        self, scope: Message, receive: Callable[[], Any], send: Callable[[Message], Any]
    ) -> None:
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
            await asyncio.sleep(0.8)
        if scope["path"] == "/flood":
            await self._flood(receive, send)
        await send({"type": "http.response.body", "body": body or b"hello"})

    async def _flood(self, receive: Callable[[], Any], send: Callable[[Message], Any]) -> None:
        gone = asyncio.ensure_future(receive())
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await asyncio.sleep(0)
        self.num_floods_ended += 1


@contextmanager
def listening(app: Application, limits: HttpLimits, keep_alive_s: float = 0.3) -> Iterator[int]:
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
def port(app: Application) -> Iterator[int]:
    with listening(app, QUICK) as port:
        yield port


def connect(port: int) -> socket:
    return create_connection(("127.0.0.1", port), timeout=5)


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


def error_code(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def seconds_to_close(sock: socket) -> float:
    begin = time.monotonic()
    read_all(sock)
    return time.monotonic() - begin


def test_a_request_within_the_limits_is_answered_and_the_connection_kept(port: int) -> None:
    with connect(port) as sock:
        for _ in range(2):
            sock.sendall(GET)
            assert read_one(sock).startswith(b"HTTP/1.1 200")


def test_headers_that_drip_end_in_408(port: int) -> None:
    with connect(port) as sock:
        begin = time.monotonic()
        answer = b""
        sock.settimeout(0.05)
        sock.sendall(b"GET / HTTP/1.1\r\n")
        while not answer and time.monotonic() - begin < 3:
            try:
                answer = sock.recv(65536)
            except TimeoutError:
                sock.sendall(b"x: y\r\n")
        assert error_code(answer) == (408, "request_timeout")
        assert 0.2 < time.monotonic() - begin < 2


def test_a_body_that_does_not_come_ends_in_408(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nabc")
        assert error_code(read_all(sock)) == (408, "request_timeout")


def test_idle_connections_are_closed(port: int) -> None:
    with connect(port) as silent, connect(port) as used:
        used.sendall(GET)
        assert 0.2 < seconds_to_close(silent) < 2
        assert seconds_to_close(used) < 2


def test_stray_line_ends_do_not_keep_a_connection(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(b"\r\n")
        assert seconds_to_close(sock) < 2


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


def test_what_is_not_http_ends_in_400(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert error_code(read_all(sock)) == (400, "invalid_http")


def test_one_connection_too_many_gets_503(app: Application) -> None:
    with listening(app, QUICK, keep_alive_s=5) as port:
        held = [connect(port) for _ in range(QUICK.max_connections)]
        for sock in held:
            sock.sendall(GET)
            read_one(sock)
        with connect(port) as sock:
            assert error_code(read_all(sock)) == (503, "too_many_connections")
        held.pop().close()
        time.sleep(0.1)
        with connect(port) as sock:
            sock.sendall(GET)
            assert read_one(sock).startswith(b"HTTP/1.1 200")
        for sock in held:
            sock.close()


def test_a_long_answer_is_not_cut_by_the_limits_on_reading(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(b"GET /slow HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert read_all(sock).endswith(b"hello\r\n0\r\n\r\n")


def test_a_pipelined_request_waits_behind_a_long_answer(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n" + GET)
        assert read_all(sock).count(b"HTTP/1.1 200") == 2


def test_half_a_pipelined_request_is_timed_once_it_is_its_turn(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\nGET / HT")
        answer = read_all(sock)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"hello" in answer
        assert b"408" in answer


def test_whoever_does_not_read_is_cut_off(app: Application, port: int) -> None:
    with socket(AF_INET, SOCK_STREAM) as sock:
        sock.setsockopt(SOL_SOCKET, SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", port))
        sock.sendall(b"GET /flood HTTP/1.1\r\nhost: x\r\n\r\n")
        deadline = time.monotonic() + 5
        while app.num_floods_ended == 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)
