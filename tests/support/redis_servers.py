"""A real Redis server for tests, and servers that misbehave on purpose."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REQUIRE = "KVPAGING_REQUIRE_REDIS"
"""Where this is set, a missing redis-server fails the tests that need it."""


@contextlib.contextmanager
def redis_server(directory: Path, *options: str) -> Iterator[str]:
    """Start `redis-server` on a socket file; gives its URL. Skips where there is none."""
    program = shutil.which("redis-server")
    if program is None:
        message = "needs redis-server: apt-get install redis-server"
        if os.environ.get(REQUIRE):
            pytest.fail(message)
        pytest.skip(message)
    path = directory / "redis.sock"
    command = [program, "--port", "0", "--unixsocket", str(path), "--save", "", *options]
    server = subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL)
    try:
        wait_for(path)
        yield f"unix://{path}"
    finally:
        server.kill()
        server.wait()


def wait_for(path: Path) -> None:
    """Until somebody answers there."""
    for _ in range(500):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
            return
        time.sleep(0.01)
    raise TimeoutError(f"nobody answers at {path}")


Behaviour = Callable[[socket.socket], None]
"""What a server does with one connection; it may raise OSError, and the connection is closed."""


@contextlib.contextmanager
def server(behave: Behaviour) -> Iterator[str]:
    """A TCP server that treats each connection by `behave`, in a thread; gives its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def treat(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            behave(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connections.append(connection)
                threading.Thread(target=treat, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for open_socket in (listener, *connections):
            with contextlib.suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)
            open_socket.close()


def greet(connection: socket.socket) -> None:
    """Answer what redis-py says first: its name and its version."""
    connection.recv(1 << 16)
    connection.sendall(b"+OK\r\n+OK\r\n")


def never_greet(connection: socket.socket) -> None:
    """Take everything and answer nothing."""
    while connection.recv(1 << 16):
        pass


def hang(connection: socket.socket) -> None:
    """Greet, then take everything and answer nothing."""
    greet(connection)
    while connection.recv(1 << 16):
        pass


def hang_deaf(connection: socket.socket) -> None:
    """Greet, then do not even read."""
    greet(connection)
    time.sleep(30)


def drip(connection: socket.socket) -> None:
    """Begin a reply of a megabyte, and send a byte of it now and then."""
    greet(connection)
    connection.sendall(b"$1000000\r\n")
    while True:
        connection.sendall(b"x")
        time.sleep(0.01)


def hang_up(connection: socket.socket) -> None:
    """Close at the first command."""
    connection.recv(1)


def always(reply: bytes) -> Behaviour:
    """Answer everything with the same bytes, often enough for any pipeline."""

    def behave(connection: socket.socket) -> None:
        while connection.recv(1 << 16):
            connection.sendall(reply * 300)

    return behave


def proxy(path: str, change: Callable[[bytes], bytes]) -> Behaviour:
    """Pass everything on to the server at `path`, its replies through `change`, chunk by chunk."""

    def behave(connection: socket.socket) -> None:
        with socket.socket(socket.AF_UNIX) as behind:
            behind.connect(path)

            def answer() -> None:
                with contextlib.suppress(OSError):
                    while data := behind.recv(1 << 16):
                        connection.sendall(change(data))
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

            threading.Thread(target=answer, daemon=True).start()
            while data := connection.recv(1 << 16):
                behind.sendall(data)

    return behave
