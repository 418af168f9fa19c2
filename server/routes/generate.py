"""`POST /generate`: the native dialect, and TGI's where the body has `inputs`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvpaging.base.ids import RequestId
from server.errors import Dialect
from server.generation import Completed, Done, Order, Piece, TextDelta, collect
from server.observe.record import RequestRecord, record_of
from server.routes import tgi
from server.routes.answers import (
    GENERATION_ERRORS,
    explanations_of,
    finite_logprob,
    json_response,
    read_body,
    stream_response,
)
from server.schemas.body import JsonObject, event_stream, json_body, parse, refuse_both
from server.schemas.generate import (
    GenerateEnd,
    GenerateEvent,
    GenerateOutput,
    GenerateRequest,
    GenerateResponse,
    GenerateTimings,
    GenerateUsage,
    TokenLogprob,
)
from server.schemas.retention import retention_of
from server.schemas.tgi import TgiRequest, TgiResponse
from server.service import Service, ServiceDep
from server.sse import data_event, until_gone

router: Final = APIRouter(tags=["generate"])


@router.post(
    "/generate",
    summary="Complete a prompt",
    openapi_extra=json_body([GenerateRequest, TgiRequest]),
    responses={
        200: {
            "model": GenerateResponse | TgiResponse,
            **event_stream("`data` is a `GenerateEvent`, the `GenerateEnd`, or `[DONE]`"),
        },
        **GENERATION_ERRORS,
        422: tgi.TGI_ERRORS[422],
    },
)
async def generate(request: Request, service: ServiceDep) -> Response:
    """Complete a prompt; with `stream`, as server-sent events.

    A body with `inputs` is in TGI's dialect, and so is its answer.
    """
    record = record_of(request.scope)
    body = await read_body(request, service)
    refuse_both(body, "prompt", "inputs")
    if "inputs" in body:
        record.dialect = Dialect.TGI
        return await tgi.respond(request, service, body, stream=None)
    return await _respond(request, service, body, record)


async def _respond(
    request: Request, service: Service, body: JsonObject, record: RequestRecord
) -> Response:
    asked = parse(GenerateRequest, body)
    service.open_door(record)
    order = await _order(asked, service, request)
    record.generation_id, record.stream = order.request_id, asked.stream
    news = service.generate([order], record)
    if asked.stream:
        return stream_response(news, lambda item: _frame(order, item, service), service, record)
    outputs, done = await until_gone(request.receive, collect(news))
    answer: GenerateResponse = {
        "id": order.request_id,
        "model": service.config.served_model_name,
        "outputs": [_output(order, output) for output in outputs],
        "usage": _usage(done),
        "timings": _timings(done),
    }
    if asked.explain:
        answer["explanations"] = explanations_of(done, service)
    return json_response(answer)


async def _order(asked: GenerateRequest, service: Service, request: Request) -> Order:
    token_ids = await service.prompt_ids(asked.prompt)
    max_new_tokens = service.max_new_tokens(
        len(token_ids),
        asked.max_new_tokens,
        max(service.config.default_max_new_tokens, asked.min_new_tokens),
    )
    return Order(
        request_id=RequestId(f"gen-{secrets.token_hex(12)}"),
        prompt_token_ids=token_ids,
        sampling=asked.sampling(max_new_tokens),
        stop=tuple(asked.stop),
        n=asked.n,
        priority=asked.priority,
        owner=service.owner_of(request, asked, len(token_ids)),
        retention=retention_of(asked.cache),
        explain=asked.explain,
    )


def _output(order: Order, output: Completed) -> GenerateOutput:
    return {
        "index": output.index,
        "text": output.text,
        "token_ids": [piece.sample.token_id for piece in output.pieces],
        "finish_reason": output.finish.reason,
        "stop_reason": output.finish.stop_reason,
        "logprobs": _logprobs(order, output.pieces),
    }


def _frame(order: Order, item: TextDelta | Done, service: Service) -> bytes:
    if isinstance(item, Done):
        end: GenerateEnd = {
            "id": order.request_id,
            "usage": _usage(item),
            "timings": _timings(item),
        }
        if order.explain:
            end["explanations"] = explanations_of(item, service)
        return data_event(end)
    event: GenerateEvent = {
        "id": order.request_id,
        "index": item.index,
        "text": item.text,
        "token_ids": [piece.sample.token_id for piece in item.pieces],
        "logprobs": _logprobs(order, item.pieces),
        "finish_reason": item.finish.reason if item.finish else None,
    }
    if item.finish is not None:
        event["stop_reason"] = item.finish.stop_reason
    return data_event(event)


def _logprobs(order: Order, pieces: Sequence[Piece]) -> list[TokenLogprob] | None:
    if order.sampling.logprobs is None:
        return None
    return [
        {
            "token_id": piece.sample.token_id,
            "logprob": finite_logprob(piece.sample.logprob),
            "top": [
                {"token_id": token_id, "logprob": finite_logprob(logprob)}
                for token_id, logprob in piece.sample.top
            ],
        }
        for piece in pieces
    ]


def _usage(done: Done) -> GenerateUsage:
    return {
        "prompt_tokens": done.usage.prompt_tokens,
        "completion_tokens": done.usage.completion_tokens,
        "cached_tokens": done.usage.cached_tokens,
    }


def _timings(done: Done) -> GenerateTimings:
    return {
        "queue_ms": done.timings.queue_ms,
        "ttft_ms": done.timings.ttft_ms,
        "prefill_ms": done.timings.prefill_ms,
        "decode_ms": done.timings.decode_ms,
    }
