"""The cache as its operator sees it: what it does, and how to empty it.

The routes are the operator's, see `server.operator_door`: they tell what all tenants do together.
"""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import APIRouter, Query, Request
from starlette.responses import Response
from typing_extensions import TypedDict

from kvpaging.base.errors import BadRequest
from server.observe.cache_report import CacheReport, report
from server.routes.answers import json_response
from server.schemas.errors import ErrorResponse
from server.service import ServiceDep
from server.sse import until_gone

router: Final = APIRouter(tags=["operations"])

LevelName = Annotated[
    str | None, Query(description="`device`, `host`, `disk` or `remote`; without it, all of them.")
]


class FlushAnswer(TypedDict):
    """What was forgotten, and where that failed."""

    pages: dict[str, int | None]
    """By level; `null` where only its server knows."""
    failed: tuple[str, ...]
    """Levels that could not be emptied, and may have pages still."""


@router.delete(
    "/cache",
    summary="Empty the cache, or one level of it",
    responses={
        200: {"model": FlushAnswer},
        400: {"model": ErrorResponse, "description": "No such level here"},
        502: {"model": FlushAnswer, "description": "A level could not be emptied"},
        503: {"model": ErrorResponse},
    },
)
async def flush(request: Request, service: ServiceDep, level: LevelName = None) -> Response:
    """Forget pages, and wait until it is done. Pages in use stay with the requests that use them.

    What they compute is not found by others either, until they have ended.
    """
    service.engine_config()
    flushed = await until_gone(request.receive, service.client.flush_cache(level))
    if not (flushed.pages or flushed.failed):
        raise BadRequest(f"there is no level {level!r:.60} here", param="level")
    answer = FlushAnswer(pages=flushed.pages, failed=flushed.failed)
    return json_response(answer, 502 if flushed.failed else 200)


@router.get(
    "/cache/stats",
    summary="What the cache does, level by level",
    responses={200: {"model": CacheReport}, 503: {"model": ErrorResponse}},
)
async def stats(request: Request, service: ServiceDep) -> Response:
    """Give hits, times, rates and state of each level since the engine began."""
    service.engine_config()
    return json_response(report(await until_gone(request.receive, service.client.cache_stats())))
