"""The cache as its operator sees it: what it does, and how to empty it.

The routes are the operator's, see `server.operator_door`: they tell what all tenants do together.
"""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.observe.cache_report import CacheReport, report
from server.routes.answers import json_response
from server.schemas.errors import ErrorResponse
from server.service import ServiceDep
from server.sse import until_gone

router: Final = APIRouter(tags=["operations"])


@router.get(
    "/cache/stats",
    summary="What the cache does, level by level",
    responses={200: {"model": CacheReport}, 503: {"model": ErrorResponse}},
)
async def stats(request: Request, service: ServiceDep) -> Response:
    """Give hits, times, rates and state of each level since the engine began."""
    service.engine_config()
    return json_response(report(await until_gone(request.receive, service.client.cache_stats())))
