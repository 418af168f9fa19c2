"""Requests that an engine works on: what their readers have not taken yet, and whom to suspect.

Knows no process and no message.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Final

import msgspec

from kvpaging.base.errors import KvPagingError
from kvpaging.scheduling.outputs import SequenceOutput
from kvpaging.scheduling.request import Request

MAX_SUSPECTS: Final = 4096


class Stream:
    """One open request: what the engine said and its reader has not taken yet."""

    def __init__(self, request: Request, max_pending: int):
        self.request = request
        self._max_pending = max_pending
        self._pending: deque[SequenceOutput] = deque()
        self._error: KvPagingError | None = None
        self._news = asyncio.Event()
        self._num_unfinished = request.n

    @property
    def is_complete(self) -> bool:
        """Each of the request's outputs has ended."""
        return self._num_unfinished == 0

    def put(self, output: SequenceOutput) -> bool:
        """Keep an output for the reader. False, and not kept, when that is too far behind."""
        if len(self._pending) >= self._max_pending:
            return False
        self._pending.append(output)
        self._num_unfinished -= output.finished is not None
        self._news.set()
        return True

    def fail(self, error: KvPagingError) -> None:
        """End with this error, once the reader has taken what is pending."""
        self._error = error
        self._news.set()

    async def take(self) -> SequenceOutput | None:
        """Give the next output, or `None` after the last. Raises what `fail` was told."""
        while not self._pending:
            if self._error is not None:
                raise self._error
            if self.is_complete:
                return None
            self._news.clear()
            await self._news.wait()
        return self._pending.popleft()


class Suspects:
    """Requests that were open at a crash, known again by their content.

    Each tenant's apart: a refusal tells nobody what another sent. A client that tries again sends
    the same content under a new id, and where it gave no seed the server draws another: both are
    left out. Bystanders are cleared as soon as they complete.
    """

    def __init__(self) -> None:
        self._num_crashes: OrderedDict[bytes, int] = OrderedDict()

    def accuse(self, requests: Iterable[Request]) -> None:
        """Remember that these were open at a crash. The oldest are forgotten for them."""
        for digest in {self._digest(request) for request in requests}:
            self._num_crashes[digest] = self._num_crashes.pop(digest, 0) + 1
        while len(self._num_crashes) > MAX_SUSPECTS:
            self._num_crashes.popitem(last=False)

    def clear(self, request: Request) -> None:
        """It completed, so it is not the cause."""
        if self._num_crashes:
            self._num_crashes.pop(self._digest(request), None)

    def is_banned(self, request: Request) -> bool:
        """It was open at two crashes and has not completed since the first."""
        return bool(self._num_crashes) and self._num_crashes.get(self._digest(request), 0) >= 2

    @staticmethod
    def _digest(request: Request) -> bytes:
        sampling = msgspec.structs.replace(request.sampling, seed=0)
        content = msgspec.msgpack.encode(
            (request.tenant, request.prompt_token_ids, sampling, request.n)
        )
        return hashlib.sha256(content).digest()
