"""`POST /v1/completions`, as the `openai` package expects it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvpaging.scheduling.plan import Sample
from server.errors import Dialect
from server.generation import Completed, Done, Order, TextDelta, collect
from server.observe.record import record_of
from server.routes.answers import (
    GENERATION_ERRORS,
    explanations_of,
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
from server.text import Text

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
    text = await service.text()
    orders = await _orders(asked, call, service, request)
    writer = _Writer(asked, call, text, orders, service)
    news = service.generate(orders, record, FIELD_NAMES)
    if asked.stream:
        return stream_response(news, writer.frame, service, record)
    outputs, done = await until_gone(request.receive, collect(news))
    answer = writer.response([writer.choice(output) for output in outputs])
    return json_response(writer.ended(answer, done))


async def _orders(
    asked: CompletionRequest, call: Call, service: Service, request: Request
) -> list[Order]:
    orders = []
    for number, prompt in enumerate(asked.prompts):
        token_ids = await service.prompt_ids(prompt)
        default = max(DEFAULT_MAX_TOKENS, asked.min_tokens or 0)
        max_new_tokens = service.max_new_tokens(len(token_ids), asked.max_tokens, default)
        is_score = max_new_tokens == 0
        order = order_for(
            asked,
            token_ids,
            1 if is_score else max_new_tokens,
            service,
            request,
            f"{call.id}-{number}",
            len(token_ids),
        )
        orders.append(replace(order, is_score=is_score))
    return orders


@dataclass(frozen=True, slots=True)
class _Token:
    """A token for the lists of log-probabilities; a prompt's first one has none."""

    sample: Sample
    offset: int
    """Of its text, in the choice's text."""


class _Writer:
    """One call's choices, whole or as events; knows how long each one's text is so far."""

    def __init__(
        self,
        asked: CompletionRequest,
        call: Call,
        text: Text,
        orders: Sequence[Order],
        service: Service,
    ):
        self._asked = asked
        self._call = call
        self._text = text
        self._orders = orders
        self._service = service
        self._lengths: dict[int, int] = {}
        """Of the texts that were given, by choice."""

    def response(self, choices: list[CompletionChoice]) -> CompletionResponse:
        """Give the object that these choices come in."""
        return {
            "id": self._call.id,
            "object": "text_completion",
            "created": self._call.created,
            "model": self._call.model,
            "choices": choices,
        }

    def ended(self, answer: CompletionResponse, done: Done) -> CompletionResponse:
        """Give the answer with what is known at the end."""
        answer["usage"] = usage_of(done.usage)
        if self._asked.explain:
            answer["explanations"] = explanations_of(done, self._service)
        return answer

    def choice(self, item: Completed | TextDelta) -> CompletionChoice:
        """Give an output, or what is new of it."""
        echo, tokens = "", list[_Token]()
        if self._asked.echo and item.index not in self._lengths:
            # Not sooner: by now the engine knows that all of the prompt's ids are tokens.
            number = item.index // self._asked.num_outputs
            echo = self._echo(self._asked.prompts[number])
            tokens = self._prompt_tokens(self._orders[number], item.prompt_samples, echo)
        offset = self._lengths.get(item.index, 0) + len(echo)
        self._lengths[item.index] = offset + len(item.text)
        for piece in item.pieces:
            tokens.append(_Token(piece.sample, offset))
            offset += len(piece.text)
        return {
            "index": item.index,
            "text": echo + item.text,
            "logprobs": self._logprobs(tokens),
            "finish_reason": item.finish.reason if item.finish else None,
            "stop_reason": item.finish.stop_reason if item.finish else None,
        }

    def frame(self, item: TextDelta | Done) -> bytes:
        """Give the event for what is new; nothing where there is nothing to tell."""
        if isinstance(item, Done):
            if not self._asked.wants_end:
                return b""
            return data_event(self.ended(self.response([]), item))
        choice = self.choice(item)
        if not (choice["text"] or choice["logprobs"] or choice["finish_reason"]):
            return b""
        event = self.response([choice])
        if self._asked.includes_usage:
            event["usage"] = None
        return data_event(event)

    def _echo(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return self._text.tokenizer.decode(prompt, skip_special_tokens=False)

    def _prompt_tokens(self, order: Order, scored: Sequence[Sample], echo: str) -> list[_Token]:
        if self._asked.logprobs is None:
            return []
        tokenizer, detokenizer = self._text.tokenizer, self._text.detokenizer()
        tokens = []
        offset = 0
        for sample in (Sample(order.prompt_token_ids[0]), *scored):
            tokens.append(_Token(sample, min(offset, len(echo))))
            token_id = sample.token_id
            offset += len(detokenizer.push(token_id))
            name = tokenizer.token_text(token_id) if tokenizer.is_special(token_id) else ""
            if name and echo.startswith(name, offset):  # else the tokenizer put it there
                offset += len(name)
        return tokens

    def _logprobs(self, tokens: Sequence[_Token]) -> CompletionLogprobs | None:
        if self._asked.logprobs is None:
            return None
        text_of = self._text.tokenizer.token_text
        logprobs: CompletionLogprobs = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token in tokens:
            sample = token.sample
            top: dict[str, float] = {}
            for token_id, logprob in sample.top:
                top.setdefault(text_of(token_id), finite_logprob(logprob))
            is_scored = sample.logprob is not None
            logprobs["tokens"].append(text_of(sample.token_id))
            logprobs["token_logprobs"].append(finite_logprob(sample.logprob) if is_scored else None)
            logprobs["top_logprobs"].append(top if is_scored else None)
            logprobs["text_offset"].append(token.offset)
        return logprobs
