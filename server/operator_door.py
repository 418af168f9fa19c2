"""Routes of who runs the server: what all tenants do together, and what they may not do.

    no keys at all                   open: local use
    an operator key                  it opens them, and opens nothing else
    one API key, no operator key     that key: there is nobody to keep apart
    several, no operator key         nobody: the answer says which setting is missing

Plain ASGI, outside of the check of clients' keys. Knows no tenant.
"""

from __future__ import annotations

import hmac
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError

OPERATOR_PATHS: Final = frozenset({"/metrics", "/pages", "/cache"})
OPERATOR_PREFIX: Final = "/cache/"
IS_OPERATOR: Final = "kvpaging.is_operator"
"""In a request's scope: the operator sent it, so no client's key is asked for."""


class OperatorDoor:
    """Lets only the holder of `key` through to operator's routes; without a key, nobody.

    Raises `ApiError` within the request: 401 without a key, 403 with another one.
    """

    def __init__(self, app: ASGIApp, key: str | None):
        self._app = app
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on that is the operator's, or that is for another route."""
        if scope["type"] == "http" and is_operators(scope["path"]):
            self._check(bearer_key(Headers(scope=scope)).encode())
            scope[IS_OPERATOR] = True
        await self._app(scope, receive, send)

    def _check(self, given: bytes) -> None:
        if self._key is not None and hmac.compare_digest(given, self._key):
            return
        if not given:
            raise ApiError(
                401,
                "the operator's key is needed: send `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self._key is None:
            raise ApiError(
                403,
                "this route is the operator's, and several API keys are known here: "
                "set KVPAGING_OPERATOR_KEY and use that key",
                code="operator_only",
            )
        raise ApiError(
            403,
            "this route is the operator's: the key given does not open it",
            code="operator_only",
        )


def is_operators(path: str) -> bool:
    """Whether this path is an operator's."""
    return path in OPERATOR_PATHS or path.startswith(OPERATOR_PREFIX)


def bearer_key(headers: Headers) -> str:
    """Give the key that a request came with, or an empty text."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
