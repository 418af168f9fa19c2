"""`POST /v1/chat/completions`, as the `openai` package expects it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.errors import Dialect
from server.generation import Completed, Done, Finish, Piece, TextDelta, collect
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
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatDelta,
    ChatLogprobs,
)
from server.service import Service, ServiceDep
from server.sse import data_event, until_gone
from server.text import Tokenizer

router: Final = APIRouter(prefix="/v1", tags=["openai"])

CHAT_FIELD_NAMES: Final = FIELD_NAMES | {"prompt": "messages"}


@router.post(
    "/chat/completions",
    summary="Continue a conversation (OpenAI)",
    openapi_extra=json_body(ChatCompletionRequest),
    responses={
        200: {
            "model": ChatCompletionResponse,
            **event_stream("`data` is a `ChatCompletionChunk`, or `[DONE]`"),
        },
        **GENERATION_ERRORS,
        **NO_SUCH_MODEL,
    },
)
async def complete(request: Request, service: ServiceDep) -> Response:
    """Continue a conversation, written as a prompt by the model's own chat template."""
    record = record_of(request.scope)
    record.dialect = Dialect.OPENAI
    asked = parse(ChatCompletionRequest, await read_body(request, service))
    call = begin(asked, service, record, "chatcmpl")
    tokenizer = (await service.text()).tokenizer
    messages = [message.for_template() for message in asked.messages]
    variables = asked.chat_template_kwargs or {}
    token_ids = await service.chat_ids(messages, variables)
    num_shared_tokens = 0
    if asked.cache_scope == "shared":
        num_shared_tokens = await service.num_system_tokens(messages, variables, token_ids)
    max_new_tokens = service.max_new_tokens(len(token_ids), asked.num_new_tokens, None)
    order = order_for(
        asked, token_ids, max_new_tokens, service, request, call.id, num_shared_tokens
    )
    writer = _Writer(asked, call, tokenizer, service)
    news = service.generate([order], record, CHAT_FIELD_NAMES)
    if asked.stream:
        return stream_response(news, writer.frame, service, record)
    outputs, done = await until_gone(request.receive, collect(news))
    return json_response(writer.response(outputs, done))


class _Writer:
    """One call's choices, whole or as events; knows which outputs have begun."""

    def __init__(
        self, asked: ChatCompletionRequest, call: Call, tokenizer: Tokenizer, service: Service
    ):
        self._asked = asked
        self._call = call
        self._tokenizer = tokenizer
        self._service = service
        self._begun: set[int] = set()

    def response(self, outputs: Sequence[Completed], done: Done) -> ChatCompletionResponse:
        """Give the whole answer."""
        answer: ChatCompletionResponse = {
            "id": self._call.id,
            "object": "chat.completion",
            "created": self._call.created,
            "model": self._call.model,
            "choices": [self._choice(output) for output in outputs],
            "usage": usage_of(done.usage),
        }
        if self._asked.explain:
            answer["explanations"] = explanations_of(done, self._service)
        return answer

    def frame(self, item: TextDelta | Done) -> bytes:
        """Give the events for what is new: the role first, the end in one of its own."""
        if isinstance(item, Done):
            if not self._asked.wants_end:
                return b""
            end = self._chunk([])
            end["usage"] = usage_of(item.usage)
            if self._asked.explain:
                end["explanations"] = explanations_of(item, self._service)
            return data_event(end)
        events = []
        if item.index not in self._begun:
            self._begun.add(item.index)
            events.append(self._event(item.index, {"role": "assistant", "content": ""}))
        logprobs = self._logprobs(item.pieces)
        if item.text or (logprobs and logprobs["content"]):
            events.append(self._event(item.index, {"content": item.text}, logprobs))
        if item.finish is not None:
            events.append(self._event(item.index, {}, finish=item.finish))
        return b"".join(events)

    def _choice(self, output: Completed) -> ChatChoice:
        return {
            "index": output.index,
            "message": {"role": "assistant", "content": output.text},
            "logprobs": self._logprobs(output.pieces),
            "finish_reason": output.finish.reason,
            "stop_reason": output.finish.stop_reason,
        }

    def _event(
        self,
        index: int,
        delta: ChatDelta,
        logprobs: ChatLogprobs | None = None,
        finish: Finish | None = None,
    ) -> bytes:
        choice: ChatChunkChoice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish.reason if finish else None,
        }
        if finish is not None:
            choice["stop_reason"] = finish.stop_reason
        chunk = self._chunk([choice])
        if self._asked.includes_usage:
            chunk["usage"] = None
        return data_event(chunk)

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        return {
            "id": self._call.id,
            "object": "chat.completion.chunk",
            "created": self._call.created,
            "model": self._call.model,
            "choices": choices,
        }

    def _logprobs(self, pieces: Sequence[Piece]) -> ChatLogprobs | None:
        if not self._asked.logprobs:
            return None
        text_of, bytes_of = self._tokenizer.token_text, self._tokenizer.token_bytes
        return {
            "content": [
                {
                    "token": text_of(piece.sample.token_id),
                    "logprob": finite_logprob(piece.sample.logprob),
                    "bytes": list(bytes_of(piece.sample.token_id)),
                    "top_logprobs": [
                        {
                            "token": text_of(token_id),
                            "logprob": finite_logprob(logprob),
                            "bytes": list(bytes_of(token_id)),
                        }
                        for token_id, logprob in piece.sample.top
                    ],
                }
                for piece in pieces
            ]
        }
