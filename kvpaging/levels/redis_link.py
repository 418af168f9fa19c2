"""Commands to a server that speaks the Redis protocol, with one deadline over each whole call.

The only module that knows redis-py. Its asyncio side runs on a thread of its own, because only
there does a deadline cover everything: resolving the name, connecting, a server that hangs, and one
that sends a byte now and then.

Knows nothing of pages.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Final, NamedTuple
from urllib.parse import parse_qs, urlsplit

from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from kvpaging.base.errors import ConfigError

Command = Sequence[bytes | int]

_GRACE_S: Final = 0.05
"""How much later than its deadline a call is given up from outside the thread."""
_URL_OPTIONS: Final = frozenset(
    {"ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname"}
)


class Refusal(NamedTuple):
    """An error that the server replied to one command."""

    message: str


class RedisLink:
    """Connections to one server. Safe to call from several threads."""

    def __init__(self, url: str) -> None:
        """Connect to nothing yet. Raises ConfigError for a URL that can't be used."""
        self.address = _check(url)
        # TLS options, user, password and database come from the URL. Retries are the caller's.
        self._maker = ConnectionPool.from_url(
            url,
            protocol=2,
            socket_timeout=None,
            socket_connect_timeout=None,
            retry=Retry(NoBackoff(), 0),
        )
        self._closing = threading.Lock()
        self._is_closed = False
        self._idle: list[AbstractConnection] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="kvpaging-redis", daemon=True
        )
        self._thread.start()

    def call(
        self, commands: Sequence[Command], deadline_s: float
    ) -> tuple[list[object], str | None]:
        """Send all commands at once; the replies that arrived in time, and what went wrong.

        An error that the server replies is a `Refusal` in its place. Never raises: the other side
        may send anything.
        """
        replies: list[object] = []
        with self._closing:
            if self._is_closed:
                return replies, "closed"
            future = asyncio.run_coroutine_threadsafe(
                self._call(commands, replies, deadline_s), self._loop
            )
        try:
            future.result(deadline_s + _GRACE_S)
        except TimeoutError:
            future.cancel()
            return list(replies), f"no answer within {deadline_s * 1000:.0f} ms"
        except Exception as error:  # noqa: BLE001 - what a lying server makes the parser raise
            return list(replies), f"{type(error).__name__}: {error}"
        return replies, None

    def close(self) -> None:
        """Drop the connections and end the thread. Idempotent."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
        self._loop.call_soon_threadsafe(self._loop.create_task, self._end())
        self._thread.join()
        self._loop.close()

    async def _call(
        self, commands: Sequence[Command], replies: list[object], deadline_s: float
    ) -> None:
        async with asyncio.timeout(deadline_s):
            if self._idle:
                try:
                    return await self._exchange(self._idle.pop(), commands, replies)
                except RedisConnectionError:
                    if replies:
                        raise
                    # Idle connections end when a server restarts: that is no failure yet.
            connection = self._maker.make_connection()
            await self._exchange(connection, commands, replies)

    async def _exchange(
        self, connection: AbstractConnection, commands: Sequence[Command], replies: list[object]
    ) -> None:
        """Send and receive; the connection is idle afterwards, or closed if anything went wrong."""
        transport: asyncio.WriteTransport | None = None
        try:
            await connection.connect()
            transport = _transport(connection)
            packed = connection.pack_commands(commands)
            await connection.send_packed_command(packed, check_health=False)
            for _ in commands:
                reply = await _reply(connection)
                replies.append(reply)
        except BaseException:
            await _drop(connection, transport)
            raise
        self._idle.append(connection)

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in self._idle:
            await _drop(connection, _transport(connection))
        await asyncio.sleep(0)  # the transports' last callbacks
        self._loop.stop()


async def _reply(connection: AbstractConnection) -> object:
    try:
        return await connection.read_response()
    except ResponseError as error:
        return Refusal(str(error))


def _transport(connection: AbstractConnection) -> asyncio.WriteTransport | None:
    writer: asyncio.StreamWriter | None = getattr(connection, "_writer", None)
    return None if writer is None else writer.transport


async def _drop(connection: AbstractConnection, transport: asyncio.WriteTransport | None) -> None:
    """Close at once: redis-py would keep the socket until a deaf server has read everything."""
    if transport is not None:
        transport.abort()
    try:
        await connection.disconnect(nowait=True)
    except (RedisError, OSError):
        return  # it is gone either way


def _check(url: str) -> str:
    """The server's address without its secrets. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"the remote cache's URL can't be read: {error}") from None
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise ConfigError(
            "the remote cache's URL must begin with redis://, rediss:// (TLS) or unix://, "
            f"not {parts.scheme}://"
        )
    if parts.scheme == "unix":
        return parts.path
    if not parts.hostname:
        raise ConfigError("the remote cache's URL names no host")
    if parts.path.strip("/") and not parts.path.strip("/").isdecimal():
        raise ConfigError(f"the remote cache's database must be a number, not {parts.path[1:]!r}")
    unknown = parse_qs(parts.query).keys() - _URL_OPTIONS
    if unknown:
        raise ConfigError(
            f"the remote cache's URL has options that are not known: {', '.join(sorted(unknown))}; "
            f"known are {', '.join(sorted(_URL_OPTIONS))}"
        )
    return f"{parts.hostname}:{port or 6379}"
