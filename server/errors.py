"""Every error as HTTP: one table from what was raised to status and body.

    {"error": {"message", "type", "param", "code"}}     everywhere
    {"error": "message", "error_type": "..."}           in TGI's dialect

Knows no request: `server.app` and `server.sse` ask it what to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from starlette.exceptions import HTTPException

from kvpaging.base.errors import BadRequest, EngineDied, KvPagingError, Overloaded
from server.client import ShuttingDown


class Dialect(StrEnum):
    """Whose formats a request and its answer are in."""

    NATIVE = "native"
    OPENAI = "openai"
    TGI = "tgi"


class ApiError(KvPagingError):
    """An error that belongs to HTTP and not to the engine."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})


class ClientGone(KvPagingError):
    """The client closed its connection, so nobody is left to answer."""


class SlowReader(ClientGone):
    """The client does not take its stream, and is given up."""


LOADING_RETRY_S: Final = 2.0
"""Advice to clients while the engine loads; how long it takes is not known."""

MAX_SHOWN_CHARS: Final = 60
"""Of a value given, in an error message."""

CLIENT_GONE_STATUS: Final = 499
"""In logs only: nobody receives it."""

_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_TGI_STATUS: Final = {400: 422}
_TGI_TYPES: Final = {
    422: "validation",
    424: "generation",
    429: "overloaded",
    500: "incomplete_generation",
    503: "unhealthy",
}


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """What to tell the client."""

    status: int
    message: str
    code: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def type(self) -> str:
        """The class of the error, in the words of OpenAI's clients."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return _TYPES.get(self.status, default)

    def status_in(self, dialect: Dialect) -> int:
        """Give the status that this dialect's clients expect."""
        return _TGI_STATUS.get(self.status, self.status) if dialect is Dialect.TGI else self.status

    def body_in(self, dialect: Dialect) -> dict[str, object]:
        """Give the body that this dialect's clients read."""
        if dialect is Dialect.TGI:
            kind = _TGI_TYPES.get(self.status_in(dialect), self.type)
            if self.code == "engine_died":
                kind = "generation"
            return {"error": self.message, "error_type": kind}
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def answer_to(error: Exception) -> ErrorAnswer:
    """Find what to tell the client of any exception; of an unexpected one, nothing but that."""
    match error:
        case ApiError():
            return ErrorAnswer(
                error.status,
                error.message,
                error.code,
                error.param,
                error.headers | _retry_after(error.retry_after_s),
            )
        case BadRequest():
            return ErrorAnswer(400, error.message, error.code, error.param)
        case Overloaded():
            return ErrorAnswer(
                429, error.message, "overloaded", headers=_retry_after(error.retry_after_s)
            )
        case ShuttingDown():
            return answer_to(draining(LOADING_RETRY_S))
        case EngineDied():
            return ErrorAnswer(
                503, str(error), "engine_died", headers=_retry_after(LOADING_RETRY_S)
            )
        case SlowReader():
            return ErrorAnswer(CLIENT_GONE_STATUS, str(error), "slow_reader")
        case ClientGone():
            return ErrorAnswer(CLIENT_GONE_STATUS, "the client closed the connection", "gone")
        case HTTPException():
            code = {404: "not_found", 405: "method_not_allowed"}.get(
                error.status_code, "http_error"
            )
            return ErrorAnswer(
                error.status_code, str(error.detail), code, headers=dict(error.headers or {})
            )
        case _:
            return ErrorAnswer(
                500, "an internal error; the server's log has its traceback", "internal_error"
            )


def _retry_after(seconds: float | None) -> dict[str, str]:
    return {} if seconds is None else {"Retry-After": str(max(1, math.ceil(seconds)))}


def loading(detail: str) -> ApiError:
    """503: the engine is not there yet, or not any more."""
    return ApiError(
        503,
        f"the engine is not ready: {detail}",
        code="loading",
        retry_after_s=LOADING_RETRY_S,
    )


def stalled(detail: str) -> ApiError:
    """503: the engine makes no progress; what came before may yet end well."""
    return ApiError(
        503, f"the engine is stalled: {detail}", code="stalled", retry_after_s=LOADING_RETRY_S
    )


def draining(retry_after_s: float) -> ApiError:
    """503: this server is going away; another one may answer."""
    return ApiError(
        503, "the server is shutting down", code="draining", retry_after_s=retry_after_s
    )


def unknown_model(name: str, served: str) -> ApiError:
    """404: not the model that runs here."""
    return ApiError(
        404,
        f"the model {name[:MAX_SHOWN_CHARS]!r} is not served here; {served!r} is",
        code="model_not_found",
        param="model",
    )
