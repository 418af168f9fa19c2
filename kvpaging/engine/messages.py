"""The typed messages between the API process and the engine process. Never pickle.

Each frame on the socket is a 4-byte little-endian length and a msgpack body of at most
`MAX_FRAME_BYTES`. The first message of each side is `Hello`; sides of different versions part with
an error. Knows nothing of sockets or processes.
"""

from __future__ import annotations

from typing import Final

import msgspec

from kvpaging.base.config import EngineConfig, EngineOptions
from kvpaging.cache.load_costs import LoadChoices
from kvpaging.cache.pins import PinState
from kvpaging.cache.statistics import LoadTimes
from kvpaging.levels.level import BelowStats
from kvpaging.scheduling.events import Abort, Arrival, Finish, Flush, Unpin
from kvpaging.scheduling.outputs import StepOutputs

PROTOCOL_VERSION: Final = 1
MAX_FRAME_BYTES: Final = 64 * 1024 * 1024


class Hello(msgspec.Struct, frozen=True, tag=True):
    """First message of each side."""

    version: int
    options: EngineOptions | None = None
    """From the API: what to start."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End now; what still runs is lost. Draining is the API's business: it stops sending."""


class GetPages(msgspec.Struct, frozen=True, tag=True):
    """Ask for a `PagePicture`."""

    query_id: int


class GetCacheStats(msgspec.Struct, frozen=True, tag=True):
    """Ask for `CacheStats`."""

    query_id: int


class GetPins(msgspec.Struct, frozen=True, tag=True):
    """Ask for a `PinList`: of one tenant or all, of one name or any."""

    query_id: int
    tenant: str | None = None
    name: str | None = None


class Loading(msgspec.Struct, frozen=True, tag=True):
    """How far the weights are."""

    stage: str
    done_bytes: int = 0
    total_bytes: int = 0


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine serves from now on; `config` holds its limits, for answers at the door."""

    config: EngineConfig


class EngineStats(msgspec.Struct, frozen=True, tag=True):
    """State now, and totals since the start of this engine process."""

    step_id: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_free_pages: int = 0
    num_cached_pages: int = 0
    num_held_pages: int = 0
    num_wasted_slots: int = 0
    """Slots of held pages that hold no token: less than one page a sequence."""
    num_evicted_pages: int = 0
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    num_computed_tokens: int = 0
    num_loading: int = 0
    """Sequences whose pages a lower level is filling."""
    num_loaded_pages: int = 0
    step_s: float = 0.0
    """The last step, wall time."""
    num_quarantined_pages: int = 0
    num_pinned_pages: int = 0
    broken_laws: tuple[str, ...] = ()


class StepDone(msgspec.Struct, frozen=True, tag=True):
    """After each step."""

    outputs: StepOutputs
    stats: EngineStats


class PageState(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One page as it is now."""

    page_id: int
    state: str
    """`free`, `cached`, `held` or `quarantined`."""
    num_owners: int
    num_tokens: int


class PagePicture(msgspec.Struct, frozen=True, tag=True):
    """The answer to `GetPages`."""

    query_id: int
    page_size: int
    pages: tuple[PageState, ...]


class CacheStats(msgspec.Struct, frozen=True, tag=True):
    """The answer to `GetCacheStats`: the cache now, and totals since this engine process began."""

    query_id: int = 0
    page_size: int = 1
    page_bytes: int = 0
    """Of the device's memory."""
    pages: dict[str, int] = {}
    """On the device, by state."""
    queried_tokens: int = 0
    """Of prompts that were placed."""
    hit_tokens: int = 0
    queried_pages: int = 0
    hit_pages: dict[str, int] = {}
    """By level."""
    missed_pages: dict[str, int] = {}
    """By reason."""
    num_recomputed_tokens: int = 0
    """After preemptions."""
    evictions: dict[str, int] = {}
    """From the device, by cause."""
    saved_s: float = 0.0
    """See `kvpaging.cache.statistics.CacheCounters`."""
    load_times: dict[str, LoadTimes] = {}
    """By level."""
    choices: LoadChoices = LoadChoices(None, (), 0, 0)
    below: BelowStats = BelowStats()


class PinList(msgspec.Struct, frozen=True, tag=True):
    """The answer to `GetPins`."""

    query_id: int
    page_size: int
    max_pages: int
    pins: tuple[PinState, ...]


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine can't start with these options; trying again would not help."""

    message: str


Query = GetPages | GetCacheStats | GetPins
Answer = PagePicture | CacheStats | PinList
ToEngine = Hello | Arrival | Abort | Finish | Unpin | Flush | Query | Shutdown
FromEngine = Hello | Loading | Ready | StepDone | Answer | StartFailed
