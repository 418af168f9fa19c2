"""The error bodies."""

from __future__ import annotations

from typing_extensions import TypedDict


class ErrorDetail(TypedDict):
    """What went wrong. `code` is stable; `param` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(TypedDict):
    """The body of every error."""

    error: ErrorDetail


class TgiErrorResponse(TypedDict):
    """The body of every error in TGI's dialect."""

    error: str
    error_type: str
