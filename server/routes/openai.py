"""What OpenAI's two kinds of completion share: the model's name, orders, usage, models."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvpaging.base.ids import RequestId
from server.client import EngineStatus
from server.errors import Dialect, unknown_model
from server.generation import Order, Usage
from server.observe.record import RequestRecord, record_of
from server.routes.answers import json_response
from server.schemas.errors import ErrorResponse
from server.schemas.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    Model,
    ModelList,
    OpenAIUsage,
)
from server.schemas.retention import retention_of
from server.service import Service, ServiceDep

router: Final = APIRouter(prefix="/v1", tags=["openai"])

NO_SUCH_MODEL: Final[dict[int | str, dict[str, Any]]] = {
    404: {"model": ErrorResponse, "description": "No such model here"}
}


@dataclass(frozen=True, slots=True)
class Call:
    """What every part of one call's answer repeats."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))


def begin(
    asked: CompletionRequest | ChatCompletionRequest,
    service: Service,
    record: RequestRecord,
    prefix: str,
) -> Call:
    """Check the model's name and the door, and give the call its id."""
    if asked.model != service.config.served_model_name:
        raise unknown_model(asked.model, service.config.served_model_name)
    service.open_door(record)
    call = Call(f"{prefix}-{secrets.token_hex(12)}", service.config.served_model_name)
    record.dialect = Dialect.OPENAI
    record.generation_id, record.stream = call.id, bool(asked.stream)
    return call


def order_for(
    asked: CompletionRequest | ChatCompletionRequest,
    token_ids: tuple[int, ...],
    max_new_tokens: int,
    service: Service,
    request: Request,
    request_id: str,
    num_shared_tokens: int,
) -> Order:
    """Give the order for one prompt; in the shared scope its first tokens are everybody's."""
    return Order(
        request_id=RequestId(request_id),
        prompt_token_ids=token_ids,
        sampling=asked.sampling(max_new_tokens),
        stop=tuple(asked.stop or ()),
        n=asked.num_outputs,
        priority=asked.priority or 0,
        owner=service.owner_of(request, asked, num_shared_tokens),
        retention=retention_of(asked.cache),
        explain=bool(asked.explain),
    )


def usage_of(usage: Usage) -> OpenAIUsage:
    """Give the usage in OpenAI's words; `cached_tokens` is always there."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


@router.get("/models", summary="List models", responses={200: {"model": ModelList}})
async def list_models(request: Request, service: ServiceDep) -> Response:
    """Give the one model that is served here."""
    record_of(request.scope).dialect = Dialect.OPENAI
    models: ModelList = {"object": "list", "data": [_model(service, service.client.status())]}
    return json_response(models)


@router.get(
    "/models/{model_id:path}",
    summary="Describe a model",
    responses={200: {"model": Model}, **NO_SUCH_MODEL},
)
async def get_model(model_id: str, request: Request, service: ServiceDep) -> Response:
    """Give the model of this name; the name may contain slashes."""
    record_of(request.scope).dialect = Dialect.OPENAI
    if model_id != service.config.served_model_name:
        raise unknown_model(model_id, service.config.served_model_name)
    return json_response(_model(service, service.client.status()))


def _model(service: Service, status: EngineStatus) -> Model:
    name = service.config.served_model_name
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "kvpaging",
        "root": name,
        "parent": None,
        "max_model_len": status.config.scheduler.max_model_len if status.config else None,
    }
