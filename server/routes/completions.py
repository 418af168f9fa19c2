"""`POST /v1/completions`, as the `openai` package expects it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.errors import Dialect
from server.generation import Completed, Done, Order, Piece, TextDelta, collect
from server.observe.record import record_of
from server.routes.answers import (
    GENERATION_ERRORS,
    finite_logprob,
    json_response,
    read_body,
    stream_response,
)
from server.routes.openai import NO_SUCH_MODEL, Call, begin, order_for, usage_of
from server.schemas.body import event_stream, json_body, parse
from server.schemas.openai import (
    FIELD_NAMES,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)
from server.service import Service, ServiceDep
from server.sse import data_event, until_gone
from server.text import Tokenizer

router: Final = APIRouter(prefix="/v1", tags=["openai"])

DEFAULT_MAX_TOKENS: Final = 16
"""OpenAI's; less where less fits."""


@router.post(
    "/completions",
    summary="Complete prompts (OpenAI)",
    openapi_extra=json_body(CompletionRequest),
    responses={
        200: {
            "model": CompletionResponse,
            **event_stream("`data` is a `CompletionResponse`, or `[DONE]`"),
        },
        **GENERATION_ERRORS,
        **NO_SUCH_MODEL,
    },
)
async def complete(request: Request, service: ServiceDep) -> Response:
    """Complete one or several prompts; choice `i * n + k` is output `k` of prompt `i`."""
    record = record_of(request.scope)
    record.dialect = Dialect.OPENAI
    asked = parse(CompletionRequest, await read_body(request, service))
    call = begin(asked, service, record, "cmpl")
    tokenizer = (await service.text()).tokenizer
    orders = await _orders(asked, call, service, request)
    writer = _Writer(asked, call, tokenizer, _echoes(asked, tokenizer))
    news = service.generate(orders, record, FIELD_NAMES)
    if asked.stream:
        return stream_response(news, writer.frame, service, record)
    outputs, done = await until_gone(request.receive, collect(news))
    answer = writer.response([writer.choice(output) for output in outputs])
    answer["usage"] = usage_of(done.usage)
    return json_response(answer)


async def _orders(
    asked: CompletionRequest, call: Call, service: Service, request: Request
) -> list[Order]:
    orders = []
    for number, prompt in enumerate(asked.prompts):
        token_ids = await service.prompt_ids(prompt)
        default = max(DEFAULT_MAX_TOKENS, asked.min_tokens or 0)
        max_new_tokens = service.max_new_tokens(len(token_ids), asked.max_tokens, default)
        request_id = f"{call.id}-{number}"
        orders.append(order_for(asked, token_ids, max_new_tokens, service, request, request_id))
    return orders


def _echoes(asked: CompletionRequest, tokenizer: Tokenizer) -> list[str]:
    """Give what each output's text begins with."""
    echoes = []
    for prompt in asked.prompts:
        if not asked.echo:
            echo = ""
        elif isinstance(prompt, str):
            echo = prompt
        else:
            echo = tokenizer.decode(prompt, skip_special_tokens=False)
        echoes += [echo] * asked.num_outputs
    return echoes


class _Writer:
    """One call's choices, whole or as events; knows how long each one's text is so far."""

    def __init__(
        self, asked: CompletionRequest, call: Call, tokenizer: Tokenizer, echoes: Sequence[str]
    ):
        self._asked = asked
        self._call = call
        self._tokenizer = tokenizer
        self._echoes = list(echoes)
        """What is still to be given before an output's first text."""
        self._offsets = [0 for _ in echoes]

    def response(self, choices: list[CompletionChoice]) -> CompletionResponse:
        """Give the object that these choices come in."""
        return {
            "id": self._call.id,
            "object": "text_completion",
            "created": self._call.created,
            "model": self._call.model,
            "choices": choices,
        }

    def choice(self, item: Completed | TextDelta) -> CompletionChoice:
        """Give an output, or what is new of it."""
        echo, self._echoes[item.index] = self._echoes[item.index], ""
        offset = self._offsets[item.index]
        self._offsets[item.index] = offset + len(item.text)
        return {
            "index": item.index,
            "text": echo + item.text,
            "logprobs": self._logprobs(item.pieces, offset),
            "finish_reason": item.finish.reason if item.finish else None,
            "stop_reason": item.finish.stop_reason if item.finish else None,
        }

    def frame(self, item: TextDelta | Done) -> bytes:
        """Give the event for what is new; nothing where there is nothing to tell."""
        if isinstance(item, Done):
            if not self._asked.includes_usage:
                return b""
            event = self.response([])
            event["usage"] = usage_of(item.usage)
            return data_event(event)
        choice = self.choice(item)
        if not (choice["text"] or choice["logprobs"] or choice["finish_reason"]):
            return b""
        event = self.response([choice])
        if self._asked.includes_usage:
            event["usage"] = None
        return data_event(event)

    def _logprobs(self, pieces: Sequence[Piece], offset: int) -> CompletionLogprobs | None:
        if self._asked.logprobs is None:
            return None
        text_of: Callable[[int], str] = self._tokenizer.token_text
        logprobs: CompletionLogprobs = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for piece in pieces:
            top: dict[str, float] = {}
            for token_id, logprob in piece.sample.top:
                top.setdefault(text_of(token_id), finite_logprob(logprob))
            logprobs["tokens"].append(text_of(piece.sample.token_id))
            logprobs["token_logprobs"].append(finite_logprob(piece.sample.logprob))
            logprobs["top_logprobs"].append(top)
            logprobs["text_offset"].append(offset)
            offset += len(piece.text)
        return logprobs
