"""Prefixes that are computed ahead: from a file at the start, or as the operator asks.

Each is computed chunk by chunk, in requests that the engine runs only while no other request waits
or runs. A chunk that gives way to one is all that is lost. Knows no wire format.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from msgspec.structs import replace

from kvpaging.base.config import SchedulerConfig
from kvpaging.base.errors import ConfigError, EngineDied, KvPagingError, Overloaded
from kvpaging.base.ids import RequestId
from kvpaging.scheduling import admission
from kvpaging.scheduling.outputs import FinishReason, SequenceOutput
from kvpaging.scheduling.request import Request, SamplingParams
from server.client import ShuttingDown
from server.errors import ApiError
from server.schemas.body import decode_object, parse
from server.schemas.preload import PreloadItem, PreloadStatus
from server.schemas.retention import retention_of

if TYPE_CHECKING:
    from server.service import Service

_logger: Final = logging.getLogger(__name__)

MAX_WAITING: Final = 100_000
"""Prefixes that may wait to be computed."""
MAX_WAITING_BYTES: Final = 32 * 1024 * 1024
"""Of their JSON; one call is taken whatever its size where none waits."""
MAX_ERRORS: Final = 100
"""The last ones are remembered."""
MAX_LOGGED: Final = 20
"""So many failures are logged until preloading is over; all are counted."""
MAX_LINE_BYTES: Final = 16 * 1024 * 1024
NUM_TRIES: Final = 3
"""Of a prefix, when the engine ends under it."""
POLL_S: Final = 0.5


class NotComputed(KvPagingError):
    """The engine gave a prefix up."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    where: str
    """For people: file and line, or place in a call."""
    item: PreloadItem | bytes
    """Bytes: a line that is not parsed yet."""
    num_bytes: int = 0
    """Of a call's item, which waits in memory."""


class Preloader:
    """Computes what is wanted, one prefix after the other, on the event loop's thread."""

    def __init__(self, service: Service):
        self._service = service
        self._wanted: deque[_Wanted] = deque()
        self._num_bytes = 0
        """Of those."""
        self._task: asyncio.Task[None] | None = None
        self._file: IO[bytes] | None = None
        self._path: Path | None = None
        self._num_lines = 0
        self._errors: deque[str] = deque(maxlen=MAX_ERRORS)
        self._num_done = self._num_failed = self._num_tokens = self._num_cached = 0
        self._num_logged = 0
        """Failures, since it began to work."""
        self._current: str | None = None

    def status(self) -> PreloadStatus:
        """Give how far it is."""
        is_working = self._task is not None and not self._task.done()
        return {
            "state": "working" if is_working else "idle",
            "now": self._current,
            "waiting": len(self._wanted),
            "file": None if self._file is None else f"{self._path}, line {self._num_lines}",
            "done": self._num_done,
            "failed": self._num_failed,
            "tokens": self._num_tokens,
            "cached_tokens": self._num_cached,
            "errors": list(self._errors),
        }

    def read(self, path: Path) -> None:
        """Take what a file of JSON lines wants. Raises ConfigError if it can't be opened.

        It is read as its lines are worked off; a bad line is said and left out.
        """
        self._file, self._path = open_file(path), path
        self._start()

    def add(self, items: Sequence[PreloadItem]) -> None:
        """Take more prefixes. Raises `BadRequest` or `Overloaded` having taken none."""
        for item in items:
            self._service.tenant_of(item)
        wanted = [
            _Wanted(f"item {i}", item, len(item.model_dump_json())) for i, item in enumerate(items)
        ]
        num_bytes = sum(one.num_bytes for one in wanted)
        if len(self._wanted) + len(wanted) > MAX_WAITING or (
            self._wanted and self._num_bytes + num_bytes > MAX_WAITING_BYTES
        ):
            raise Overloaded(
                f"{len(self._wanted)} prefixes of {self._num_bytes} bytes wait to be preloaded; "
                f"{MAX_WAITING} of {MAX_WAITING_BYTES} bytes may, and these are {len(wanted)} of "
                f"{num_bytes}",
                retry_after_s=60.0,
            )
        self._wanted.extend(wanted)
        self._num_bytes += num_bytes
        self._start()

    async def close(self) -> None:
        """Stop; what was computed stays. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._close_file()

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())

    async def _work(self) -> None:
        before = self._num_done, self._num_failed, self._num_tokens
        self._num_logged = 0
        while not self._service.is_draining and (wanted := self._next()) is not None:
            await asyncio.sleep(0)  # however many lines can't be used, others have their turns
            if wanted.item == b"":
                continue
            self._current = wanted.where
            try:
                await self._compute(_read(wanted.item))
            except ShuttingDown:
                return
            except (KvPagingError, ApiError) as error:
                if self._service.is_draining:
                    return
                self._fail(f"{wanted.where}: {error}")
            except Exception as error:  # noqa: BLE001 (one's fault must not cost the others)
                self._fail(
                    f"{wanted.where}: internal error ({type(error).__name__})", exc_info=True
                )
            else:
                self._num_done += 1
                self._service.metrics.preloaded("done")
                if self._num_done % 100 == 0:
                    _logger.info("%d prefixes are preloaded", self._num_done)
            finally:
                self._current = None
        _logger.info(
            "preloading is over: %d prefixes of %d tokens, %d failed",
            self._num_done - before[0],
            self._num_tokens - before[2],
            self._num_failed - before[1],
        )

    def _next(self) -> _Wanted | None:
        """The next one: what was asked for by calls first."""
        if self._wanted:
            wanted = self._wanted.popleft()
            self._num_bytes -= wanted.num_bytes
            return wanted
        while self._file is not None:
            self._num_lines += 1
            where = f"{self._path}, line {self._num_lines}"
            try:
                line = self._file.readline(MAX_LINE_BYTES + 1)
            except OSError as error:
                self._fail(f"{where}: {error.strerror}; the rest is not read")
                line = b""
            if len(line) > MAX_LINE_BYTES:
                self._fail(f"{where}: longer than {MAX_LINE_BYTES} bytes; the rest is not read")
                line = b""
            if line:
                return _Wanted(where, line.strip())
            self._close_file()
        return None

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _fail(self, why: str, *, exc_info: bool = False) -> None:
        self._num_failed += 1
        self._service.metrics.preloaded("failed")
        self._errors.append(why)
        self._num_logged += 1
        if self._num_logged <= MAX_LOGGED:
            _logger.warning("preload: %s", why, exc_info=exc_info)
        elif self._num_logged == MAX_LOGGED + 1:
            _logger.warning("preload: more failed, which are counted and not logged")

    async def _compute(self, item: PreloadItem) -> None:
        """Compute one prefix; again where the engine ended under it."""
        for num_left in reversed(range(NUM_TRIES)):
            limits = await self._limits()
            try:
                await self._compute_chunks(item, limits)
                return
            except EngineDied:
                if not num_left or self._service.is_draining:
                    raise

    async def _limits(self) -> SchedulerConfig:
        """The engine's, once there is one."""
        while True:
            try:
                self._service.require_not_draining()
                return self._service.engine_config().scheduler
            except ApiError:
                if self._service.is_draining:
                    raise
                await asyncio.sleep(POLL_S)

    async def _compute_chunks(self, item: PreloadItem, limits: SchedulerConfig) -> None:
        whole = await self._request(item)
        admission.check(whole, limits, self._service.engine_config().vocab_size)
        num_tokens = len(whole.prompt_token_ids)
        size = max(1, limits.max_num_batched_tokens // limits.page_size) * limits.page_size
        for start in range(0, num_tokens, size):
            chunk = replace(
                whole,
                request_id=RequestId(f"preload-{secrets.token_hex(12)}"),
                prompt_token_ids=whole.prompt_token_ids[: start + size],
                retention=replace(
                    whole.retention, pin=whole.retention.pin and start + size >= num_tokens
                ),
            )
            num_cached = 0
            async for output in self._service.client.submit(chunk):
                num_cached = output.num_cached_tokens
                _check_end(output)
            self._num_cached += max(0, num_cached - start)
        self._num_tokens += num_tokens

    async def _request(self, item: PreloadItem) -> Request:
        """The prefix as one request."""
        token_ids, num_shared_tokens = await self._service.prefix_ids(item)
        namespaces = self._service.config.namespaces
        namespaces.check(item.cache_scope)
        tenant = self._service.tenant_of(item)
        owner = namespaces.owner(tenant, item.cache_salt, num_shared_tokens)
        return Request(
            RequestId("preload"),
            token_ids,
            SamplingParams(max_new_tokens=1, seed=0),
            namespace=owner.namespace,
            shared=owner.shared,
            tenant=owner.tenant,
            tenant_pages=self._service.max_pages_of(owner.tenant),
            retention=retention_of(item.cache),
            is_idle=True,
        )


def open_file(path: Path) -> IO[bytes]:
    """Raises ConfigError. No pipe: reading must never wait."""
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"--preload: {path} is not a file")
        return path.open("rb")
    except OSError as error:
        raise ConfigError(f"--preload: {path} can't be read: {error.strerror}") from None


def _read(item: PreloadItem | bytes) -> PreloadItem:
    """Raises BadRequest that names the field."""
    if isinstance(item, bytes):
        return parse(PreloadItem, decode_object(item, "the line"))
    return item


def _check_end(output: SequenceOutput) -> None:
    """Raise where the prefix was not computed to its end."""
    end = output.finished
    if end is not None and end.reason in (FinishReason.ERROR, FinishReason.ABORT):
        raise NotComputed(end.message or "the engine ended it before it was computed")
