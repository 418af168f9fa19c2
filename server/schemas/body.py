"""JSON bodies: read within limits, parsed strictly, refused in words that help.

Knows no particular format.
"""

from __future__ import annotations

import asyncio
import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.requests import ClientDisconnect, Request

from kvpaging.base.errors import BadRequest
from server.errors import MAX_SHOWN_CHARS, ApiError, ClientGone

ModelT = TypeVar("ModelT", bound=BaseModel)

JsonObject = dict[str, Any]


class StrictModel(BaseModel):
    """No conversions (`true` is not 1, `"1"` is not 1), no NaN, and no field that we don't know."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class LenientModel(BaseModel):
    """The same, but unknown fields are ignored, as the clients of other servers expect."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


class BodyBudget:
    """Bytes of all bodies that are being read, however many connections bring them."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._num_bytes = 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Give what takes bytes, until the end of the block. It raises `ApiError` (503)."""
        taken = 0

        def take(num_bytes: int) -> None:
            nonlocal taken
            if self._num_bytes + num_bytes > self._max_bytes:
                raise ApiError(
                    503,
                    f"the requests that arrive now are over {self._max_bytes} bytes together",
                    code="too_many_bodies",
                    retry_after_s=1.0,
                    headers={"Connection": "close"},
                )
            taken += num_bytes
            self._num_bytes += num_bytes

        try:
            yield take
        finally:
            self._num_bytes -= taken


async def read_json_object(
    request: Request, *, max_bytes: int, timeout_s: float, budget: BodyBudget
) -> JsonObject:
    """Read the body of `request`.

    Raises `BadRequest` (no JSON object), `ClientGone`, or `ApiError`: 413 too large, 408 too slow,
    503 over the budget.
    """
    with budget.share() as take:
        body = await _read(request, max_bytes, timeout_s, take)
        return decode_object(body, "the body")


def decode_object(text: bytes, what: str) -> JsonObject:
    """Give the JSON object that `text` is. Raises `BadRequest`, also where it nests too deeply."""
    try:
        content = from_json(text, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise BadRequest(f"{what} is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(content, dict):
        raise BadRequest(f"{what} must be a JSON object, not {_kind(content)}", code="invalid_json")
    return content


async def _read(
    request: Request, max_bytes: int, timeout_s: float, take: Callable[[int], None]
) -> bytes:
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
                take(len(chunk))
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


def refuse_both(content: JsonObject, *names: str) -> None:
    """Raise `BadRequest` when fields of two dialects are given: which one is meant is a guess."""
    given = [name for name in names if name in content]
    if len(given) > 1:
        raise BadRequest(f"give only one of {' and '.join(given)}", param=given[-1])


def parse(model: type[ModelT], content: JsonObject) -> ModelT:
    """Give the validated model. Raises `BadRequest` that names the field, limit and value."""
    if model.model_config.get("extra") == "forbid":
        # Looked for first: a misspelt field is also a missing one, and its own error says more.
        for name in content:
            if name not in model.model_fields:
                shown = _cut(name)
                hint = _did_you_mean(name, model)
                raise BadRequest(f"unknown field {shown!r}{hint}", param=shown)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise _bad_request(error.errors(include_url=False), content) from error


def _bad_request(errors: Sequence[ErrorDetails], content: JsonObject) -> BadRequest:
    first = errors[0]
    param = _cut(".".join(_path(first, content))) or None
    message = _words(first, param)
    if len(errors) > 1:
        message += f" (and {len(errors) - 1} more)"
    return BadRequest(message, param=param)


def _path(error: ErrorDetails, content: object) -> Iterator[str]:
    """Give the place of a fault in what was sent; pydantic's own names for unions are left out."""
    last = len(error["loc"]) - 1
    for depth, part in enumerate(error["loc"]):
        is_item = isinstance(content, list) and isinstance(part, int) and part < len(content)
        if is_item or (isinstance(content, dict) and part in content):
            content = content[part]  # type: ignore[index]
        elif not (depth == last and error["type"] == "missing"):
            continue
        yield str(part)


def _words(error: ErrorDetails, param: str | None) -> str:
    match error["type"]:
        case "missing":
            return f"{param} is missing"
        case "value_error":  # our own validators: their words are complete
            reason = str(error.get("ctx", {}).get("error", error["msg"]))
            return f"{param}: {reason}" if param else reason
        case kind if kind in _RULES:
            rule = _RULES[kind].format(**error.get("ctx", {}))
            return f"{param} {rule}"
        case kind if kind in _KINDS:
            return f"{param} must be {_KINDS[kind]}, not {_shown(error['input'])}"
        case _:
            reason = error["msg"].replace("Input should", "must", 1)
            return f"{param} {reason}, not {_shown(error['input'])}"


_RULES: Final = {
    "too_short": "must have at least {min_length} items, not {actual_length}",
    "too_long": "must have at most {max_length} items, not {actual_length}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
}
_KINDS: Final = {
    "dict_type": "an object",
    "list_type": "a list",
    "model_type": "an object",
    "string_type": "a text",
}


def _did_you_mean(name: str, model: type[BaseModel]) -> str:
    if len(name) > MAX_SHOWN_CHARS:
        return ""
    close = difflib.get_close_matches(name, model.model_fields, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return _kind(value)
    try:
        return _cut(json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError):
        return _kind(value)


def _cut(text: str) -> str:
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
