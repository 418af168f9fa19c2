"""What reaches the scheduler between two steps: data, so that it can be recorded and replayed."""

from __future__ import annotations

import msgspec

from kvpaging.base.ids import RequestId
from kvpaging.cache.lower_levels import LevelsFlushed, PagesLoaded, PagesLost
from kvpaging.scheduling.request import Request


class Arrival(msgspec.Struct, frozen=True, tag=True):
    """A new request."""

    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True):
    """The client is gone: give everything back. Unknown or finished ids are ignored."""

    request_id: RequestId


class Finish(msgspec.Struct, frozen=True, tag=True):
    """Text ended one output (a stop string): it is complete with its first `num_tokens` tokens.

    The engine may have sampled more by now; whoever sent this drops them.
    """

    request_id: RequestId
    output_index: int
    num_tokens: int


class Unpin(msgspec.Struct, frozen=True, tag=True):
    """The pin that this request made ends, or is never made. Unknown ids are ignored."""

    request_id: RequestId


class Flush(msgspec.Struct, frozen=True, tag=True):
    """The operator empties a level, or all (`None`). Answered by `Flushed`, once it is done."""

    query_id: int
    level: str | None


Event = Arrival | Abort | Finish | Unpin | Flush | PagesLoaded | PagesLost | LevelsFlushed
