"""Text Generation Inference's dialect, for its clients (`InferenceClient.text_generation`).

    POST /                 a stream where the body says `stream`
    POST /generate         the same; see `server.routes.generate`
    POST /generate_stream  always a stream

An output's text ends with its stop string, as TGI's does, and a special token's text is its name.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvpaging.base.errors import BadRequest, EngineDied
from kvpaging.base.ids import RequestId
from kvpaging.scheduling.outputs import FinishReason
from kvpaging.scheduling.plan import Sample
from server.errors import Dialect
from server.generation import Completed, Done, Finish, Order, Piece, TextDelta, collect
from server.observe.record import record_of
from server.routes.answers import (
    GENERATION_ERRORS,
    explanations_of,
    finite_logprob,
    json_response,
    read_body,
    stream_response,
)
from server.schemas.body import JsonObject, event_stream, json_body, parse
from server.schemas.errors import TgiErrorResponse
from server.schemas.retention import retention_of
from server.schemas.tgi import (
    TgiDetails,
    TgiParameters,
    TgiPrefillToken,
    TgiRequest,
    TgiResponse,
    TgiStreamDetails,
    TgiStreamEvent,
    TgiToken,
)
from server.service import Service, ServiceDep
from server.sse import data_event, until_gone
from server.text import Tokenizer

router: Final = APIRouter(tags=["tgi"])

FIELD_NAMES: Final = {"prompt": "inputs"}

TGI_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    422 if status == 400 else status: described | {"model": TgiErrorResponse}
    for status, described in GENERATION_ERRORS.items()
}


@router.post(
    "/",
    summary="Complete a text (TGI)",
    openapi_extra=json_body(TgiRequest),
    responses={
        200: {"model": TgiResponse, **event_stream("`data` is a `TgiStreamEvent`")},
        **TGI_ERRORS,
    },
)
async def complete(request: Request, service: ServiceDep) -> Response:
    """Complete a text; with `stream`, as server-sent events."""
    return await respond(request, service, await read_body(request, service), stream=None)


@router.post(
    "/generate_stream",
    summary="Complete a text as a stream (TGI)",
    openapi_extra=json_body(TgiRequest),
    responses={
        200: event_stream("`data` is a `TgiStreamEvent`"),
        **TGI_ERRORS,
    },
    response_class=Response,
)
async def complete_stream(request: Request, service: ServiceDep) -> Response:
    """Complete a text as server-sent events, one a token. The last has the whole text."""
    return await respond(request, service, await read_body(request, service), stream=True)


async def respond(
    request: Request, service: Service, body: JsonObject, *, stream: bool | None
) -> Response:
    """Answer a request in TGI's dialect; `stream`: `None` lets the body decide."""
    record = record_of(request.scope)
    record.dialect = Dialect.TGI
    asked = parse(TgiRequest, body)
    parameters = asked.parameters or TgiParameters.model_validate({})
    is_stream = bool(asked.stream) if stream is None else stream
    service.open_door(record)
    tokenizer = (await service.text()).tokenizer
    order = await _order(asked, parameters, service, request, is_stream=is_stream)
    record.generation_id, record.stream = order.request_id, is_stream
    news = service.generate([order], record, FIELD_NAMES)
    prefix = asked.inputs if parameters.return_full_text else ""
    if is_stream:
        frame = _framer(order, parameters, tokenizer, prefix, service)
        return stream_response(news, frame, service, record, end=b"")
    (output,), done = await until_gone(request.receive, collect(news))
    answer: TgiResponse = {"generated_text": prefix + output.text}
    reason = _finish_reason(output.finish)
    if parameters.details:
        answer["details"] = _details(order, parameters, tokenizer, output, done, reason)
        if parameters.explain:
            answer["details"]["explanations"] = explanations_of(done, service)
    return json_response(answer)


async def _order(
    asked: TgiRequest,
    parameters: TgiParameters,
    service: Service,
    request: Request,
    *,
    is_stream: bool,
) -> Order:
    if is_stream and parameters.decoder_input_details:
        raise BadRequest(
            "decoder_input_details is not supported for streams; leave it out",
            param="parameters.decoder_input_details",
        )
    token_ids = await service.prompt_ids(asked.inputs)
    if parameters.truncate is not None:
        token_ids = token_ids[-parameters.truncate :]
    max_new_tokens = service.max_new_tokens(
        len(token_ids), parameters.max_new_tokens, service.config.default_max_new_tokens
    )
    return Order(
        request_id=RequestId(f"tgi-{secrets.token_hex(12)}"),
        prompt_token_ids=token_ids,
        sampling=parameters.sampling(
            max_new_tokens, with_logprobs=is_stream or bool(parameters.details)
        ),
        stop=tuple(parameters.stop or ()),
        include_stop=True,
        owner=service.owner_of(request, parameters, len(token_ids)),
        retention=retention_of(parameters.cache),
        explain=bool(parameters.explain),
    )


def _framer(
    order: Order, parameters: TgiParameters, tokenizer: Tokenizer, prefix: str, service: Service
) -> Callable[[TextDelta | Done], bytes]:
    """Give what turns the deltas of one stream into events, one a token.

    With `details` the last one waits for what is known when the call has ended.
    """
    texts = [prefix]
    num_tokens = 0
    last: list[tuple[TgiStreamEvent, TgiStreamDetails]] = []

    def ended(event: TgiStreamEvent, details: TgiStreamDetails, done: Done) -> bytes:
        details["cached_tokens"] = done.usage.cached_tokens
        if parameters.explain:
            details["explanations"] = explanations_of(done, service)
        event["details"] = details
        return data_event(event)

    def frame(item: TextDelta | Done) -> bytes:
        nonlocal num_tokens
        if isinstance(item, Done):
            return b"".join(ended(event, details, item) for event, details in last)
        texts.append(item.text)
        reason = _finish_reason(item.finish) if item.finish else None
        frames = []
        tokens = _tokens(tokenizer, item.pieces, item.text)
        for position, (piece, token) in enumerate(zip(item.pieces, tokens, strict=True), 1):
            num_tokens += 1
            event: TgiStreamEvent = {
                "index": num_tokens,
                "token": token,
                "generated_text": None,
                "details": None,
            }
            if parameters.top_n_tokens:
                event["top_tokens"] = _top_tokens(tokenizer, piece)
            if reason is not None and position == len(item.pieces):
                event["generated_text"] = "".join(texts)
                if parameters.details:
                    details: TgiStreamDetails = {
                        "finish_reason": reason,
                        "generated_tokens": num_tokens,
                        "input_length": len(order.prompt_token_ids),
                        "cached_tokens": 0,
                        "seed": _seed(order, parameters),
                    }
                    last.append((event, details))
                    continue
            frames.append(data_event(event))
        return b"".join(frames)

    return frame


def _details(
    order: Order,
    parameters: TgiParameters,
    tokenizer: Tokenizer,
    output: Completed,
    done: Done,
    reason: str,
) -> TgiDetails:
    details: TgiDetails = {
        "finish_reason": reason,
        "generated_tokens": len(output.pieces),
        "cached_tokens": done.usage.cached_tokens,
        "seed": _seed(order, parameters),
        "prefill": _prefill(order, parameters, tokenizer, output),
        "tokens": _tokens(tokenizer, output.pieces, output.text),
    }
    if parameters.top_n_tokens:
        details["top_tokens"] = [_top_tokens(tokenizer, piece) for piece in output.pieces]
    return details


def _prefill(
    order: Order, parameters: TgiParameters, tokenizer: Tokenizer, output: Completed
) -> list[TgiPrefillToken]:
    """Give the prompt's tokens where they were asked for; before the first one is nothing."""
    if not parameters.wants_prefill:
        return []
    return [
        {
            "id": sample.token_id,
            "text": tokenizer.token_text(sample.token_id),
            "logprob": None if sample.logprob is None else finite_logprob(sample.logprob),
        }
        for sample in (Sample(order.prompt_token_ids[0]), *output.prompt_samples)
    ]


def _tokens(tokenizer: Tokenizer, pieces: Sequence[Piece], text: str) -> list[TgiToken]:
    """Give the tokens with the texts that they completed; the last has what was left as well."""
    texts = [piece.text for piece in pieces]
    if texts:
        texts[-1] += text[sum(map(len, texts)) :]
    tokens: list[TgiToken] = []
    for piece, own_text in zip(pieces, texts, strict=True):
        token_id = piece.sample.token_id
        is_special = tokenizer.is_special(token_id)
        tokens.append(
            {
                "id": token_id,
                "text": own_text + (tokenizer.token_text(token_id) if is_special else ""),
                "logprob": finite_logprob(piece.sample.logprob),
                "special": is_special,
            }
        )
    return tokens


def _top_tokens(tokenizer: Tokenizer, piece: Piece) -> list[TgiToken]:
    return [
        {
            "id": token_id,
            "text": tokenizer.token_text(token_id),
            "logprob": finite_logprob(logprob),
            "special": tokenizer.is_special(token_id),
        }
        for token_id, logprob in piece.sample.top
    ]


def _seed(order: Order, parameters: TgiParameters) -> int | None:
    return None if parameters.is_greedy else order.sampling.seed


def _finish_reason(finish: Finish) -> str:
    match finish.reason:
        case FinishReason.LENGTH:
            return "length"
        case FinishReason.STOP:
            return "stop_sequence" if isinstance(finish.stop_reason, str) else "eos_token"
        case _:
            raise EngineDied("the request was aborted")
