"""`/cache/preload`: the operator lets prefixes be computed ahead."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.routes.answers import GENERATION_ERRORS, json_response, read_body
from server.schemas.body import json_body, parse
from server.schemas.preload import PreloadRequest, PreloadStatus
from server.service import ServiceDep

router: Final = APIRouter(tags=["operations"])


@router.post(
    "/cache/preload",
    summary="Compute prefixes ahead",
    openapi_extra=json_body([PreloadRequest]),
    responses={200: {"model": PreloadStatus}, **GENERATION_ERRORS},
)
async def preload(request: Request, service: ServiceDep) -> Response:
    """Take the prefixes and answer at once; the engine computes them when it has nothing else."""
    asked = parse(PreloadRequest, await read_body(request, service))
    service.require_not_draining()
    service.preloader.add(asked.items)
    return json_response(service.preloader.status())


@router.get(
    "/cache/preload",
    summary="How far preloading is",
    responses={200: {"model": PreloadStatus}},
)
async def status(service: ServiceDep) -> Response:
    """Give counts, and the last errors."""
    return json_response(service.preloader.status())
