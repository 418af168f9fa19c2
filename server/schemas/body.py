"""JSON bodies: read within limits, parsed strictly, refused in words that help.

Knows no particular format.
"""

from __future__ import annotations

import asyncio
import difflib
import json
from collections.abc import Sequence
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.requests import ClientDisconnect, Request

from kvpaging.base.errors import BadRequest
from server.errors import ApiError, ClientGone

MAX_SHOWN_CHARS: Final = 60
"""Of a value given, in an error message."""

ModelT = TypeVar("ModelT", bound=BaseModel)

JsonObject = dict[str, Any]


class StrictModel(BaseModel):
    """No conversions (`true` is not 1, `"1"` is not 1), no NaN, and no field that we don't know."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class LenientModel(BaseModel):
    """The same, but unknown fields are ignored, as the clients of other servers expect."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


async def read_json_object(request: Request, *, max_bytes: int, timeout_s: float) -> JsonObject:
    """Read the body of `request`.

    Raises `BadRequest` (no JSON object), `ApiError` (413 too large, 408 too slow), `ClientGone`.
    """
    body = await _read(request, max_bytes, timeout_s)
    try:
        content = from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise BadRequest(f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(content, dict):
        raise BadRequest(
            f"the body must be a JSON object, not {_kind(content)}", code="invalid_json"
        )
    return content


async def _read(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    too_large = ApiError(
        413,
        f"the body is larger than the limit of {max_bytes} bytes",
        code="body_too_large",
        headers={"Connection": "close"},
    )
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise too_large
    except ClientDisconnect as error:
        raise ClientGone("the client left before its body was complete") from error
    except TimeoutError as error:
        raise ApiError(
            408,
            f"the body did not arrive within {timeout_s:g} s",
            code="body_timeout",
            headers={"Connection": "close"},
        ) from error
    return bytes(body)


def parse(model: type[ModelT], content: JsonObject) -> ModelT:
    """Give the validated model. Raises `BadRequest` that names the field, limit and value."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise _bad_request(error.errors(include_url=False), model) from error


def _bad_request(errors: Sequence[ErrorDetails], model: type[BaseModel]) -> BadRequest:
    # A misspelt field is also a missing one: its own error says more.
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    param = ".".join(str(part) for part in first["loc"]) or None
    message = _words(first, param, model)
    if len(errors) > 1:
        message += f" (and {len(errors) - 1} more)"
    return BadRequest(message, param=param)


def _words(error: ErrorDetails, param: str | None, model: type[BaseModel]) -> str:
    match error["type"]:
        case "extra_forbidden":
            return f"unknown field {param!r}{_did_you_mean(str(param), model)}"
        case "missing":
            return f"{param} is missing"
        case "value_error":  # our own validators: their words are complete
            reason = str(error.get("ctx", {}).get("error", error["msg"]))
            return f"{param}: {reason}" if param else reason
        case _:
            reason = error["msg"].replace("Input should", "must", 1)
            return f"{param} {reason}, not {_shown(error['input'])}"


def _did_you_mean(name: str, model: type[BaseModel]) -> str:
    close = difflib.get_close_matches(name, model.model_fields, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return _kind(value)
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return _kind(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 3] + "..."


def _kind(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a boolean",
        type(None): "null",
    }
    return names.get(type(value), "a number")


def event_stream(description: str) -> dict[str, Any]:
    """Describe, for OpenAPI, an answer that may come as server-sent events."""
    event = {
        "type": "object",
        "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
        "required": ["data"],
        "description": description,
    }
    return {"content": {"text/event-stream": {"schema": event}}}


def json_body(model: type[BaseModel] | Sequence[type[BaseModel]]) -> dict[str, Any]:
    """Describe the request body for OpenAPI; `server.app` adds the models' definitions."""
    models = [model] if isinstance(model, type) else list(model)
    refs = [{"$ref": f"#/components/schemas/{each.__name__}"} for each in models]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
