"""What the routes of all dialects do alike: read a body, send JSON, send a stream.

Knows no field of any format.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Final

import msgspec
from fastapi import Request
from starlette.responses import Response

from server.errors import answer_to
from server.generation import Done, TextDelta
from server.observe.record import RequestRecord
from server.schemas.body import JsonObject, read_json_object
from server.schemas.errors import ErrorResponse
from server.schemas.explanation import Explanation, explanation_of
from server.service import Service
from server.sse import DONE, EventStream, error_event

_logger: Final = logging.getLogger(__name__)

LOWEST_LOGPROB: Final = -9999.0
"""Stands for minus infinity, which JSON has not; OpenAI's value."""

BODY_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"model": ErrorResponse, "description": "The request can't be served as it was sent"},
    401: {"model": ErrorResponse, "description": "No valid API key"},
    408: {"model": ErrorResponse, "description": "The body did not arrive in time"},
    413: {"model": ErrorResponse, "description": "The body is too large"},
    503: {"model": ErrorResponse, "description": "Loading, draining, or the engine died"},
}
GENERATION_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    **BODY_ERRORS,
    429: {"model": ErrorResponse, "description": "The queue is full; see `Retry-After`"},
}


async def read_body(request: Request, service: Service) -> JsonObject:
    """Read the JSON object that a client sent, within the app's limits."""
    return await read_json_object(
        request,
        max_bytes=service.config.max_body_bytes,
        timeout_s=service.config.body_timeout_s,
        budget=service.bodies,
    )


def json_response(content: object, status: int = 200) -> Response:
    """Give this content."""
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def stream_response(
    news: AsyncGenerator[TextDelta | Done, None],
    frame: Callable[[TextDelta | Done], bytes],
    service: Service,
    record: RequestRecord,
    *,
    end: bytes = DONE,
) -> EventStream:
    """Give a stream: what `frame` makes of each item, then `end`; or one error event instead."""
    return EventStream(_frames(news, frame, record, end), service.config.stream)


async def _frames(
    news: AsyncGenerator[TextDelta | Done, None],
    frame: Callable[[TextDelta | Done], bytes],
    record: RequestRecord,
    end: bytes,
) -> AsyncGenerator[bytes, None]:
    has_begun = False
    try:
        async with aclosing(news):
            async for item in news:
                if event := frame(item):
                    has_begun = True
                    yield event
    except Exception as error:
        if not has_begun:
            raise  # it is still time for a status
        answer = answer_to(error)
        if answer.status == 500:
            _logger.exception("a stream failed", extra={"request_id": record.request_id})
        record.error = answer.code
        yield error_event(answer.body_in(record.dialect))
    else:
        yield end


def explanations_of(done: Done, service: Service) -> list[Explanation]:
    """Give each prompt's explanation, where the call asked for them."""
    policy = service.engine_config().scheduler.eviction_policy
    return [explanation_of(one.found, one.recomputed, policy) for one in done.explanations]


def finite_logprob(logprob: float | None) -> float:
    """Give a number that JSON can hold."""
    return LOWEST_LOGPROB if logprob is None else max(logprob, LOWEST_LOGPROB)
