"""How the API speaks to an engine, wherever it runs.

`EngineClient` is the seam: routes and tests know only this. `server.supervisor` has the one that
owns an engine process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Protocol

import msgspec

from kvpaging.base.config import EngineConfig
from kvpaging.base.errors import EngineDied
from kvpaging.base.ids import RequestId
from kvpaging.engine.messages import CacheStats, EngineStats, PagePicture, PinList
from kvpaging.scheduling.outputs import Flushed, SequenceOutput
from kvpaging.scheduling.request import Request


class EngineState(StrEnum):
    """What `/health` tells."""

    LOADING = "loading"
    READY = "ready"
    STALLED = "stalled"
    """Work is waiting and no step has ended for longer than the limit."""
    DEAD = "dead"
    """It ended; it is being restarted, or the crash limit is reached."""


class ShuttingDown(EngineDied):
    """The engine is ended on purpose, with the server."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class EngineStatus(msgspec.Struct, frozen=True):
    """The engine as the API sees it now."""

    state: EngineState
    detail: str
    """For people: the loading stage, why it is dead, ..."""
    config: EngineConfig | None
    stats: EngineStats
    num_restarts: int


class EngineClient(Protocol):
    """One engine. All methods are called on the event loop's thread."""

    def status(self) -> EngineStatus:
        """The state now, without waiting."""

    def submit(self, request: Request) -> AsyncIterator[SequenceOutput]:
        """Send the request and give its outputs as they come, for all of its `n` outputs.

        The iterator ends after each output has had its `finished`. Closing it early (`aclose`, or a
        cancelled task) aborts the request. Raises `BadRequest` or `Overloaded` (at the door, or by
        the engine's word) before the first item, `EngineDied` at any time.
        """

    def finish(self, request_id: RequestId, output_index: int, num_tokens: int) -> None:
        """Text ended this output at `num_tokens`: the engine stops computing it.

        Its iterator gives the output's `finished` (reason `stop`) as usual.
        """

    async def pages(self) -> PagePicture:
        """Every page as it is now. Raises `EngineDied`."""

    async def cache_stats(self) -> CacheStats:
        """What the cache did so far. Raises `EngineDied`."""

    async def pins(self, tenant: str | None = None, name: str | None = None) -> PinList:
        """Pins of this tenant, or of all; of this name, or of any. Raises `EngineDied`."""

    def unpin(self, request_id: RequestId) -> None:
        """End the pin that this request made."""

    async def flush_cache(self, level: str | None) -> Flushed:
        """Empty one level of the cache, or all, and wait for it. Raises `EngineDied`."""

    async def close(self) -> None:
        """End the engine."""
