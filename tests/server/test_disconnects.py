"""Clients that leave, or do not read, on real sockets: their requests are aborted at once."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngineClient, engine_config
from http_app import MODEL, events, listening, make_app, wait_for

from server.errors import SlowReader
from server.http_limits import HttpLimits, limited_protocol
from server.sse import EventStream, StreamLimits, until_gone

BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": ("/generate", {"prompt": "x"}),
    "tgi": ("/", {"inputs": "x"}),
    "completions": ("/v1/completions", {"model": MODEL, "prompt": ["x", "y"], "max_tokens": 99}),
    "chat": (
        "/v1/chat/completions",
        {"model": MODEL, "messages": [{"role": "user", "content": "x"}]},
    ),
}


def raw_request(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", BODIES)
def test_a_client_that_leaves_aborts_its_request_at_once(kind: str, stream: bool) -> None:
    engine = FakeEngineClient(delay_s=0.2)
    path, body = BODIES[kind]
    num_requests = 2 if kind == "completions" else 1
    with listening(make_app(engine)) as url:
        with connect(url) as client:
            client.sendall(raw_request(path, {**body, "stream": stream}))
            if stream:
                received = b""
                while b"data: " not in received:
                    received += client.recv(65536)
            wait_for(lambda: len(engine.open) == num_requests)
        left = time.monotonic()
        wait_for(lambda: not engine.open)
        assert time.monotonic() - left < 10  # 128 tokens would take 25 s
        assert len(engine.aborted) == num_requests


@pytest.mark.parametrize("stream", [False, True])
def test_also_while_it_waits_for_its_first_token(stream: bool) -> None:
    engine = FakeEngineClient(delay_s=600)
    with listening(make_app(engine)) as url:
        with connect(url) as client:
            client.sendall(raw_request("/generate", {"prompt": "x", "stream": stream}))
            wait_for(lambda: engine.open)
        wait_for(lambda: not engine.open)
    assert len(engine.aborted) == 1


def test_a_client_that_leaves_in_its_body_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with listening(make_app(FakeEngineClient())) as url:
        with connect(url) as client:
            client.sendall(raw_request("/generate", {"prompt": "x"})[:-3])
        wait_for(lambda: "499" in caplog.text)
    assert "Traceback" not in caplog.text


def test_a_left_request_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    engine = FakeEngineClient(delay_s=0.2)
    app = make_app(engine)
    with listening(app) as url:
        with connect(url) as client:
            client.sendall(raw_request("/generate", {"prompt": "x"}))
            wait_for(lambda: engine.open)
        wait_for(lambda: "499" in caplog.text)
    assert (
        b'kvpaging_requests_total{finish_reason="abort"} 1.0' in app.state.service.metrics.render()
    )


def test_a_reader_that_stops_reading_loses_its_request(caplog: pytest.LogCaptureFixture) -> None:
    """The socket's buffers fill, then the stream's own; then patience ends."""
    caplog.set_level(logging.INFO)
    config = engine_config(max_model_len=10**6, num_pages=10**6)
    engine = FakeEngineClient(config=config, groups=(200,))
    limits = StreamLimits(stall_s=0.3, max_buffered_bytes=1 << 26)
    http = limited_protocol(HttpLimits())
    with listening(make_app(engine, stream=limits), http=http) as url, connect(url) as client:
        body = {"prompt": "x", "max_new_tokens": 900_000, "stream": True, "logprobs": 0}
        client.sendall(raw_request("/generate", body))
        wait_for(lambda: engine.open)
        wait_for(lambda: not engine.open)
        assert len(engine.aborted) == 1
        received = b""
        while piece := client.recv(1 << 20):
            received = received[-100:] + piece
        assert b"[DONE]" not in received
        assert not received.endswith(b"0\r\n\r\n")  # the answer does not look complete
    (line,) = [record for record in caplog.records if record.name == "server.access"]
    assert (line.args[2], line.__dict__["error"]) == (200, "slow_reader")  # type: ignore[index]
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


class Socket:
    """The two ends of an ASGI connection, in the hands of a test."""

    def __init__(self, send: Callable[[bytes], Any]):
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        self._on_send = send

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        waiting = self._on_send(message.get("body", b""))
        if waiting is not None:
            await waiting


def test_falling_behind_by_more_than_the_buffer_closes_the_source() -> None:
    closed = []

    async def frames() -> Any:
        try:
            while True:
                yield b"x" * 100
                await asyncio.sleep(0)
        finally:
            closed.append(True)

    async def scenario() -> None:
        release = asyncio.Event()
        sock = Socket(lambda body: release.wait() if body else None)
        stream = EventStream(frames(), StreamLimits(stall_s=60, max_buffered_bytes=1000))
        task = asyncio.create_task(stream({"type": "http"}, sock.receive, sock.send))
        while not closed:
            await asyncio.sleep(0)
        release.set()
        with pytest.raises(SlowReader, match="bytes behind"):
            await task
        assert sock.sent[-1].get("more_body", True)

    asyncio.run(asyncio.wait_for(scenario(), 60))
    assert closed == [True]


def test_frames_that_wait_are_sent_together() -> None:
    async def frames() -> Any:
        for number in range(5):
            yield b"%d" % number

    async def scenario() -> list[dict[str, Any]]:
        sock = Socket(lambda body: None)
        await EventStream(frames(), StreamLimits())({"type": "http"}, sock.receive, sock.send)
        return sock.sent

    start, *bodies = asyncio.run(scenario())
    assert start["status"] == 200
    assert [body["body"] for body in bodies] == [b"01234", b""]
    assert [body["more_body"] for body in bodies] == [True, False]


def test_what_a_source_raises_before_its_first_frame_is_raised() -> None:
    async def frames() -> Any:
        raise LookupError("nothing")
        yield b""

    async def scenario() -> list[dict[str, Any]]:
        sock = Socket(lambda body: None)
        with pytest.raises(LookupError):
            await EventStream(frames(), StreamLimits())({"type": "http"}, sock.receive, sock.send)
        return sock.sent

    assert asyncio.run(scenario()) == []


def test_work_that_ends_with_the_client_still_there_is_given() -> None:
    async def work() -> int:
        return 7

    async def scenario() -> int:
        sock = Socket(lambda body: None)
        return await until_gone(sock.receive, work())

    assert asyncio.run(scenario()) == 7


def test_two_streams_do_not_mix() -> None:
    with (
        listening(make_app(FakeEngineClient(delay_s=0.001))) as url,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):

        def ask(letter: str) -> str:
            body = {"prompt": letter, "max_new_tokens": 40, "stream": True}
            deltas = events(httpx.post(f"{url}/generate", json=body))[:-2]
            return "".join(delta["text"] for delta in deltas)

        letters = "abcdefgh"
        assert list(pool.map(ask, letters)) == [letter * 40 for letter in letters]
