"""How this model reads text: `/tokenize`, `/detokenize`, and what TGI calls `/info`."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvpaging.base.errors import BadRequest
from server.errors import Dialect
from server.observe.record import record_of
from server.routes.answers import BODY_ERRORS, json_response, read_body
from server.schemas.body import JsonObject, json_body, parse, refuse_both
from server.schemas.errors import TgiErrorResponse
from server.schemas.fields import MAX_STOP_STRINGS
from server.schemas.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TgiInfo,
    TgiTokenizeRequest,
    TgiTokenSpan,
    TokenizeRequest,
    TokenizeResponse,
)
from server.service import Service, ServiceDep
from server.version import version

router: Final = APIRouter(tags=["tokens"])

_TGI_REFUSAL: Final[dict[int | str, dict[str, Any]]] = {
    422: {"model": TgiErrorResponse, "description": "The same in TGI's dialect"}
}


@router.post(
    "/tokenize",
    summary="Show the tokens of a text",
    openapi_extra=json_body([TokenizeRequest, TgiTokenizeRequest]),
    responses={
        200: {"model": TokenizeResponse | list[TgiTokenSpan]},
        **BODY_ERRORS,
        **_TGI_REFUSAL,
    },
)
async def tokenize(request: Request, service: ServiceDep) -> Response:
    """Show the token ids of a prompt or a conversation.

    A body with `inputs` is in TGI's dialect: a list of tokens with their places in the text.
    """
    body = await read_body(request, service)
    refuse_both(body, "prompt", "messages", "inputs")
    if "inputs" in body:
        record_of(request.scope).dialect = Dialect.TGI
        return json_response(await _spans(service, body))
    asked = parse(TokenizeRequest, body)
    if asked.messages is not None:
        messages = [message.for_template() for message in asked.messages]
        token_ids = await service.chat_ids(messages, asked.chat_template_kwargs)
    else:
        token_ids = await service.text_ids(
            asked.prompt or "", add_special_tokens=asked.add_special_tokens
        )
    answer: TokenizeResponse = {
        "tokens": list(token_ids),
        "count": len(token_ids),
        "max_model_len": service.engine_config().scheduler.max_model_len,
    }
    return json_response(answer)


@router.post(
    "/detokenize",
    summary="Show the text of tokens",
    openapi_extra=json_body(DetokenizeRequest),
    responses={200: {"model": DetokenizeResponse}, **BODY_ERRORS},
)
async def detokenize(request: Request, service: ServiceDep) -> Response:
    """Show the text of these token ids."""
    asked = parse(DetokenizeRequest, await read_body(request, service))
    vocab_size = service.engine_config().vocab_size
    if asked.tokens and max(asked.tokens) >= vocab_size:
        raise BadRequest(
            f"token id {max(asked.tokens)} is not in 0..{vocab_size - 1}", param="tokens"
        )
    tokenizer = (await service.text()).tokenizer
    text = await asyncio.to_thread(
        tokenizer.decode, asked.tokens, skip_special_tokens=asked.skip_special_tokens
    )
    return json_response(DetokenizeResponse(prompt=text))


@router.get(
    "/info",
    summary="Describe the server (TGI)",
    responses={200: {"model": TgiInfo}, 503: BODY_ERRORS[503]},
)
async def info(service: ServiceDep) -> Response:
    """Give model and limits in TGI's words."""
    config = service.engine_config()
    limits = config.scheduler
    answer: TgiInfo = {
        "model_id": service.config.served_model_name,
        "model_dtype": config.dtype,
        "model_device_type": config.device,
        "max_concurrent_requests": limits.max_num_waiting + limits.max_num_seqs,
        "max_best_of": 1,
        "max_stop_sequences": MAX_STOP_STRINGS,
        "max_input_tokens": limits.max_model_len - 1,
        "max_total_tokens": limits.max_model_len,
        "max_client_batch_size": 1,
        "router": "kvpaging",
        "version": version(),
    }
    return json_response(answer)


async def _spans(service: Service, body: JsonObject) -> list[TgiTokenSpan]:
    asked = parse(TgiTokenizeRequest, body)
    tokenizer = (await service.text()).tokenizer
    service.check_chars(len(asked.inputs), tokenizer, "inputs")
    spans = await asyncio.to_thread(tokenizer.spans, asked.inputs)
    return [
        {"id": token_id, "text": asked.inputs[start:stop], "start": start, "stop": stop}
        for token_id, start, stop in spans
    ]
