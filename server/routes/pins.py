"""A tenant's own pins: compute and pin a prefix, list pins, give one up.

A pin of another tenant is not there, whatever is asked. The operator sees and ends all of them
under `/cache/pins`, see `server.operator_door`.
"""

from __future__ import annotations

import secrets
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvpaging.base.errors import BadRequest
from kvpaging.base.ids import RequestId
from kvpaging.cache.pins import PinState
from kvpaging.scheduling.request import SamplingParams
from server.envelope import identity_of
from server.errors import ApiError
from server.generation import Order, collect
from server.observe.record import record_of
from server.routes.answers import GENERATION_ERRORS, json_response, read_body
from server.schemas.body import json_body, parse
from server.schemas.errors import ErrorResponse
from server.schemas.pins import (
    AllPinsAnswer,
    NewPin,
    Pin,
    PinRequest,
    PinsAnswer,
    Unpinned,
)
from server.service import Service, ServiceDep
from server.sse import until_gone

router: Final = APIRouter(tags=["pins"])


@router.post(
    "/pins",
    summary="Compute a prefix and pin its pages",
    openapi_extra=json_body([PinRequest]),
    responses={200: {"model": NewPin}, **GENERATION_ERRORS},
)
async def pin(request: Request, service: ServiceDep) -> Response:
    """Answer when the pages are there; they stay until the pin is given up or ends."""
    record = record_of(request.scope)
    asked = parse(PinRequest, await read_body(request, service))
    page_size = service.open_door(record).scheduler.page_size
    token_ids, num_shared_tokens = await service.prefix_ids(asked)
    order = Order(
        request_id=RequestId(f"pin-{secrets.token_hex(12)}"),
        prompt_token_ids=token_ids,
        sampling=SamplingParams(max_new_tokens=1, seed=0),
        owner=service.owner_of(request, asked, num_shared_tokens),
        retention=asked.retention(),
        is_score=True,
    )
    record.generation_id = order.request_id
    try:
        _, done = await until_gone(request.receive, collect(service.generate([order], record)))
    except BadRequest as error:
        whole = "prompt" if asked.messages is None else "messages"
        own = {"cache": whole, "cache.priority": "priority"}  # a request's `cache` is all of this
        param = own.get(error.param or "", error.param)
        raise BadRequest(error.message, param=param, code=error.code) from error
    if not (await until_gone(request.receive, service.client.pins(name=order.request_id))).pins:
        raise ApiError(
            503,
            "the pin has ended already: the cache was emptied meanwhile, a later pin of the same "
            "prefix took its place, or its ttl_s is over",
            code="pin_ended",
            retry_after_s=1.0,
        )
    num_pages = len(token_ids) // page_size
    answer: NewPin = {
        "id": order.request_id,
        "pages": num_pages,
        "tokens": num_pages * page_size,
        "cached_tokens": done.usage.cached_tokens,
    }
    return json_response(answer)


@router.get(
    "/pins",
    summary="This tenant's pins",
    responses={200: {"model": PinsAnswer}, 503: {"model": ErrorResponse}},
)
async def pins(request: Request, service: ServiceDep) -> Response:
    """Give the pins, the oldest first."""
    service.engine_config()
    tenant = identity_of(request.scope).tenant
    known = await until_gone(request.receive, service.client.pins(tenant))
    own = [_pin(pin, known.page_size) for pin in known.pins]
    answer: PinsAnswer = {"page_size": known.page_size, "pins": own}
    return json_response(answer)


@router.delete(
    "/pins/{pin_id}",
    summary="Give up a pin",
    responses={
        200: {"model": Unpinned},
        404: {"model": ErrorResponse},
        503: {"model": ErrorResponse},
    },
)
async def unpin(request: Request, pin_id: str, service: ServiceDep) -> Response:
    """End the pin: its pages are cached like any others from now on."""
    return await _end(request, service, pin_id, identity_of(request.scope).tenant)


@router.get(
    "/cache/pins",
    tags=["operations"],
    summary="All tenants' pins",
    responses={200: {"model": AllPinsAnswer}, 503: {"model": ErrorResponse}},
)
async def all_pins(request: Request, service: ServiceDep) -> Response:
    """Give the pins, the oldest first."""
    service.engine_config()
    known = await until_gone(request.receive, service.client.pins())
    answer: AllPinsAnswer = {
        "page_size": known.page_size,
        "max_pages": known.max_pages,
        "pins": [{"tenant": pin.tenant, **_pin(pin, known.page_size)} for pin in known.pins],
    }
    return json_response(answer)


@router.delete(
    "/cache/pins/{pin_id}",
    tags=["operations"],
    summary="End a pin, whosever it is",
    responses={
        200: {"model": Unpinned},
        404: {"model": ErrorResponse},
        503: {"model": ErrorResponse},
    },
)
async def end_pin(request: Request, pin_id: str, service: ServiceDep) -> Response:
    """End the pin: its pages are cached like any others from now on."""
    return await _end(request, service, pin_id, None)


async def _end(request: Request, service: Service, pin_id: str, tenant: str | None) -> Response:
    service.engine_config()
    found = await until_gone(request.receive, service.client.pins(tenant, pin_id))
    if not found.pins:
        raise ApiError(404, f"there is no pin {pin_id[:64]!r}", code="pin_not_found")
    service.client.unpin(RequestId(pin_id))
    answer: Unpinned = {"id": pin_id}
    return json_response(answer)


def _pin(pin: PinState, page_size: int) -> Pin:
    return {
        "id": pin.name,
        "pages": pin.num_pages,
        "tokens": pin.num_pages * page_size,
        "computed": pin.is_kept,
        "ends_in_s": None if pin.ends_in_s is None else round(pin.ends_in_s, 3),
    }
