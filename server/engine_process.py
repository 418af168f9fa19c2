"""One engine process: how it is started, heard and buried. What to make of it is the supervisor's.

Knows frames and exit codes, no requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Final, cast

import msgspec

from kvpaging.base.config import EngineOptions
from kvpaging.base.logs import LogFormat
from kvpaging.engine.connection import FrameSplitter, ProtocolError, encode_frame
from kvpaging.engine.messages import PROTOCOL_VERSION, FromEngine, Hello

ENGINE_COMMAND: Final = (sys.executable, "-P", "-m", "kvpaging.engine.process")
"""`-P`: the working directory is searched only where this process searches it, see `spawn`."""


class EngineProcess:
    """A started engine process and the API's end of its socket."""

    def __init__(self, popen: subprocess.Popen[bytes], sock: socket.socket):
        self.popen = popen
        self.sock = sock

    @classmethod
    def spawn(
        cls,
        options: EngineOptions,
        log_format: LogFormat = "console",
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> EngineProcess:
        """Start one and tell it what to load. Cheap, and needs no event loop.

        It searches for modules exactly where this process does, so that both run the same code.
        """
        search_path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        ours, theirs = socket.socketpair()
        with theirs:
            popen = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid()), log_format],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment() | {"PYTHONPATH": search_path},
            )
        ours.sendall(encode_frame(Hello(PROTOCOL_VERSION, options)))
        return cls(popen, ours)

    async def reap(self, timeout_s: float) -> int:
        """Wait for the end, kill after `timeout_s`; give the exit code (negative: a signal)."""
        try:
            return await asyncio.to_thread(self.popen.wait, timeout_s)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            return await asyncio.to_thread(self.popen.wait)


def _environment() -> dict[str, str]:
    """This process's, without its settings: some are secrets, and the engine is told by message."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KVPAGING_")}


class EngineLink(asyncio.Protocol):
    """The frames of one engine process, from the making to the loss of its socket."""

    def __init__(self, on_message: Callable[[FromEngine], None], on_lost: Callable[[str], None]):
        self._splitter = FrameSplitter(msgspec.msgpack.Decoder(FromEngine))
        self._on_message = on_message
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._fault = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport, to be able to abort it."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Hand on each whole message; what can't be read ends the connection."""
        try:
            for message in self._splitter.feed(data):
                self._on_message(message)
        except ProtocolError as error:
            self._fault = str(error)
            if self._transport is not None:
                self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Say so, and why if it was the protocol."""
        self._on_lost(self._fault)


def describe_exit(exit_code: int) -> str:
    """Say how a process ended, for people."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-exit_code).name
        hint = "; was memory short?" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    return f"killed by signal {-exit_code}"
