"""The parts put together and run: settings, engine process, application, uvicorn, signals.

    bind the port, start the engine process     at once: the engine imports torch meanwhile
    import HTTP and text, build the app         /live answers from here on
    engine ready                                the lines that say so are printed
    SIGTERM or SIGINT                           no new requests; running ones finish, or are told
    engine closed, exit 0

Knows what to start and to end, and in which order; no routes and no engine's inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import resource
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from kvpaging.base import logs
from kvpaging.base.errors import ConfigError, EngineDied
from server.announcement import LoadingProgress, announcement
from server.engine_process import ENGINE_COMMAND, EngineProcess
from server.keys import FixedKeys, KeyFile, Keys
from server.settings import Settings, flag_of
from server.supervisor import EngineSupervisor, SupervisorLimits
from server.tenants import Namespaces, secret_for

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from server.text import Text

_logger = logging.getLogger(__name__)

BACKLOG: Final = 2048
CLOSING_S: Final = 1.0
"""For the last answers to leave, after everything that can be waited for is over."""
SPARE_FILES: Final = 64
"""File descriptors for all else than connections: checkpoints, caches, engines, logs."""
POLL_S: Final = 0.05
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def serve(settings: Settings, engine_command: Sequence[str] = ENGINE_COMMAND) -> int:
    """Serve until a signal comes or the engine is given up; give the exit code.

    Raises `ConfigError` when the port or the model can't be used. Call from the main thread.
    """
    signal.signal(signal.SIGTERM, _exit_quietly)  # until the event loop handles it
    logs.configure(settings.log_format)
    listener = listen(settings.host, settings.port)
    _warn_if_open(settings)
    secret = secret_for(settings.cache_secret, settings.disk_cache)
    keys = keys_of(settings, secret)
    namespaces = Namespaces(secret, allows_shared=settings.shared_scope)
    max_connections = connections_that_fit(settings.max_connections)
    spawn = partial(
        EngineProcess.spawn, settings.engine_options(), settings.log_format, engine_command
    )
    process = spawn()
    try:
        server = _Server(settings, keys, namespaces, listener, max_connections, spawn)
        return asyncio.run(server.run(process))
    finally:
        process.popen.kill()  # no news to a process that was ended in order
        listener.close()


def keys_of(settings: Settings, secret: bytes) -> Keys | None:
    """The keys that clients need; `None`: none. Raises ConfigError."""
    if settings.api_keys is not None:
        return KeyFile(settings.api_keys.expanduser())
    return FixedKeys(settings.listed_keys, secret) if settings.listed_keys else None


def listen(host: str, port: int) -> socket.socket:
    """Take the port; who connects now is answered as soon as there is an application.

    Raises `ConfigError` naming the flag when that can't be.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except socket.gaierror as error:
        raise ConfigError(f"{flag_of('host')} {host!r} is no address: {error.strerror}") from None
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"can't listen on {host}:{port}: {reason}; choose another port with {flag_of('port')}"
        ) from None
    # Connections inherit it. Without it an event waits for the client to acknowledge the one before
    # (40 ms), since asyncio sets it only on sockets that name their protocol, as this one does not.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def connections_that_fit(wanted: int) -> int:
    """Raise this process's limit of open files as far as it may be; give what it then allows.

    Without a descriptor a connection can't even be refused: it stays in the backlog, and each turn
    of the event loop fails anew.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted + SPARE_FILES:
        return wanted
    needed = wanted + SPARE_FILES
    soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < needed:
        wanted = max(1, soft - SPARE_FILES)
        _logger.warning(
            "%d connections may be open at once, since this process may have %d open files; "
            "raise that limit (ulimit -Hn) for more",
            wanted,
            soft,
        )
    return wanted


class _Server:
    """One run of the server."""

    def __init__(
        self,
        settings: Settings,
        keys: Keys | None,
        namespaces: Namespaces,
        listener: socket.socket,
        max_connections: int,
        spawn: partial[EngineProcess],
    ):
        self._settings = settings
        self._keys = keys
        self._namespaces = namespaces
        self._listener = listener
        self._max_connections = max_connections
        self._progress = LoadingProgress()
        self._client = EngineSupervisor(
            spawn,
            limits=SupervisorLimits(
                stall_s=settings.stall_limit_s, hang_s=3 * settings.stall_limit_s
            ),
            on_loading=self._progress.report,
        )
        self._signals: list[int] = []
        self._signalled = asyncio.Event()

    async def run(self, process: EngineProcess) -> int:
        """Run until a signal comes or no engine will run any more; give the exit code."""
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._take_signal, number)
        if isinstance(self._keys, KeyFile):
            loop.add_signal_handler(signal.SIGHUP, self._keys.reload)
        await self._client.start(process)
        try:
            app = self._app()
            http = self._http(app)
            serving = asyncio.create_task(http.serve([self._listener]))
            try:
                return await self._until_end(app, http, serving)
            finally:
                await self._client.close()
                http.should_exit = True
                await serving
        finally:
            self._progress.close()
            await self._client.close()

    def _take_signal(self, number: int) -> None:
        self._signals.append(number)
        self._signalled.set()

    async def _until_end(
        self, app: FastAPI, http: uvicorn.Server, serving: asyncio.Task[None]
    ) -> int:
        given_up = self._client.given_up
        if given_up is None:
            raise RuntimeError("the supervisor was not started")
        signalled = asyncio.create_task(self._signalled.wait())
        announcing = asyncio.create_task(self._announce())
        ends: set[asyncio.Future[Any]] = {signalled, given_up, serving}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            announcing.cancel()
            signalled.cancel()
        if serving.done():
            raise RuntimeError("uvicorn ended by itself") from serving.exception()
        if not given_up.done():
            return await self._drain(app, http)
        error = given_up.result()
        if isinstance(error, EngineDied):
            _logger.critical("%s", error)
            return 1
        raise error

    async def _announce(self) -> None:
        """Say that the engine is ready; whether it became so is for others to see."""
        with contextlib.suppress(ConfigError, EngineDied):
            config = await self._client.ready()
            self._progress.close()
            lines = announcement(self._settings, config, self._listener.getsockname())
            if self._settings.log_format == "json":
                _logger.info("ready", extra={"announcement": lines})
            else:
                print("\n".join(lines), flush=True)  # noqa: T201 - what a command says

    async def _drain(self, app: FastAPI, http: uvicorn.Server) -> int:
        """Let running requests finish within the grace period; a second signal ends it."""
        grace_s = self._settings.grace_period_s
        app.state.service.drain()
        tasks = http.server_state.tasks
        _logger.info("stopping; %d requests have %g s to finish", len(tasks), grace_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while tasks and len(self._signals) == 1:
                    await asyncio.sleep(POLL_S)
        if len(self._signals) > 1:
            http.force_exit = True
            return 128 + self._signals[-1]
        if tasks:
            _logger.warning("the grace period is over; %d requests are ended", len(tasks))
        return 0

    def _app(self) -> FastAPI:
        from server.app import AppConfig, create_app  # slow; the engine loads meanwhile
        from server.preload import open_file
        from server.sse import StreamLimits

        settings = self._settings
        if settings.preload is not None:
            open_file(settings.preload).close()
        config = AppConfig(
            served_model_name=settings.model_name,
            keys=self._keys,
            namespaces=self._namespaces,
            operator_key=(
                settings.operator_key.get_secret_value() if settings.operator_key else None
            ),
            tenant_budget=settings.tenant_budget,
            max_cache_priority=settings.max_cache_priority,
            preload=settings.preload,
            max_body_bytes=settings.max_body,
            body_timeout_s=settings.body_timeout_s,
            stream=StreamLimits(stall_s=settings.write_timeout_s),
        )
        return create_app(config, self._client, _text_of(settings.model_or_demo))

    def _http(self, app: FastAPI) -> uvicorn.Server:
        import uvicorn

        from server.http_limits import HttpLimits, limited_protocol

        class Server(uvicorn.Server):
            """uvicorn's, but signals are this module's business."""

            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

        settings = self._settings
        limits = HttpLimits(
            header_timeout_s=settings.header_timeout_s,
            body_timeout_s=settings.body_timeout_s,
            write_timeout_s=settings.write_timeout_s,
            max_header_bytes=settings.max_header,
            max_connections=self._max_connections,
        )
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        return Server(
            uvicorn.Config(
                app,
                http=limited_protocol(limits),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=settings.keep_alive_s,  # type: ignore[arg-type] # any number
                timeout_graceful_shutdown=CLOSING_S,  # type: ignore[arg-type] # any number
            )
        )


def _text_of(model: str) -> Text | None:
    """The checkpoint's text if it lies here; what must be fetched first is read later.

    Raises `ConfigError`, long before the weights are loaded.
    """
    if not Path(model).expanduser().is_dir():
        return None
    from server.text import Text

    return Text.load(Path(model).expanduser())


def _warn_if_open(settings: Settings) -> None:
    try:
        is_loopback = ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        is_loopback = settings.host == "localhost"
    if not is_loopback and settings.api_key is None and settings.api_keys is None:
        _logger.warning(
            "listening on %s without an API key: whoever reaches this port may use the model; "
            "set KVPAGING_API_KEY or KVPAGING_API_KEYS",
            settings.host,
        )


def _exit_quietly(number: int, frame: FrameType | None) -> None:
    sys.exit(0)
