"""The numbers of one HTTP request, gathered while it runs and logged when it ends.

Numbers and names only: a prompt or an answer never gets here.
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Final, cast

from starlette.types import Scope

from server.errors import Dialect

_SANE_ID: Final = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_SCOPE_KEY: Final = "kvpaging.record"


@dataclass(slots=True)
class RequestRecord:
    """One request's numbers."""

    request_id: str
    tenant: str | None = None
    """Where keys are asked for."""
    dialect: Dialect = Dialect.NATIVE
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    error: str | None = None
    """The error's code, also of one that came after the status was sent."""
    generation_id: str | None = None
    stream: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    queue_ms: float | None = None
    ttft_ms: float | None = None
    finish_reasons: tuple[str, ...] = ()

    @property
    def total_ms(self) -> float:
        """From the arrival of the headers until now."""
        return round((time.monotonic() - self.started) * 1000, 3)

    def fields(self) -> dict[str, object]:
        """Give what the access-log line says; what does not apply is left out."""
        numbers = {
            "tenant": self.tenant,
            "generation_id": self.generation_id,
            "stream": self.stream or None,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
            "queue_ms": self.queue_ms,
            "ttft_ms": self.ttft_ms,
            "total_ms": self.total_ms,
            "finish_reasons": ",".join(self.finish_reasons) or None,
            "error": self.error,
        }
        return {name: value for name, value in numbers.items() if value is not None}


def request_id_from(header: str | None) -> str:
    """Take the client's id if it is short and plain, else make one."""
    if header is not None and _SANE_ID.fullmatch(header):
        return header
    return secrets.token_hex(12)


def attach(scope: Scope, record: RequestRecord) -> None:
    """Put the record where `record_of` finds it."""
    scope[_SCOPE_KEY] = record


def record_of(scope: Scope) -> RequestRecord:
    """Give the record of the request that this scope belongs to."""
    return cast(RequestRecord, scope[_SCOPE_KEY])
