"""An application over a fake engine, called in-process or on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import tiny_text
import uvicorn
from fake_engine import FakeEngineClient
from fastapi import FastAPI

from server.app import AppConfig, create_app
from server.keys import FixedKeys

MODEL = "org/tiny"


def make_app(client: FakeEngineClient, api_keys: Sequence[str] = (), **config: Any) -> FastAPI:
    if api_keys:
        config["keys"] = FixedKeys(api_keys, b"secret")
    return create_app(AppConfig(served_model_name=MODEL, **config), client, tiny_text.text())


class Caller:
    """Calls an application in-process, one request at a time."""

    def __init__(self, app: FastAPI, headers: dict[str, str] | None = None):
        self.app = app
        self._headers = headers or {}

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://test", headers=self._headers
            ) as http:
                return await http.request(method, path, **kwargs)

        return asyncio.run(call())

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return self.request("GET", path, **kwargs)

    def post(self, path: str, body: Any = None, **kwargs: Any) -> httpx.Response:
        if body is not None:
            kwargs["json"] = body
        return self.request("POST", path, **kwargs)


def events(response: httpx.Response) -> list[Any]:
    """The payloads of a stream; `[DONE]` as it is, an error event as ("error", payload)."""
    assert response.headers["content-type"].startswith("text/event-stream")
    found: list[Any] = []
    for block in response.text.split("\n\n"):
        if not block:
            continue
        lines = block.split("\n")
        data = lines[-1].removeprefix("data: ")
        assert lines[-1].startswith("data: ")
        payload = data if data == "[DONE]" else json.loads(data)
        found.append(("error", payload) if lines[0] == "event: error" else payload)
    return found


@contextlib.contextmanager
def listening(app: FastAPI, http: Any = "auto") -> Iterator[str]:
    """Run the application on a free port; gives its base URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = uvicorn.Server(
        uvicorn.Config(
            app, http=http, log_config=None, access_log=False, timeout_graceful_shutdown=1
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def wait_for(condition: Any, timeout_s: float = 60.0) -> None:
    """Wait until it holds; the bound is for what never will, however slow the machine."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
