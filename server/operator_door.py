"""Routes of who runs the server: what all tenants do together, and what they may not do.

    no keys at all                   open: local use
    an operator key                  it opens them, and opens nothing else
    no operator key                  those whose API key makes them an operator (`server.keys`)

Plain ASGI, outside of the check of clients' keys. Knows no tenant.
"""

from __future__ import annotations

import hmac
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError
from server.keys import Keys

OPERATOR_PATHS: Final = frozenset({"/metrics", "/pages", "/cache"})
OPERATOR_PREFIX: Final = "/cache/"
IS_OPERATOR: Final = "kvpaging.is_operator"
"""In a request's scope: the operator sent it, so no client's key is asked for."""


class OperatorDoor:
    """Lets only the holder of `key` through to operator's routes; without it, `keys`' operators.

    Raises `ApiError` within the request: 401 without a key, 403 with another one.
    """

    def __init__(self, app: ASGIApp, key: str | None, keys: Keys | None):
        self._app = app
        self._key = None if key is None else key.encode()
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on that is the operator's, or that is for another route."""
        if scope["type"] == "http" and is_operators(scope["path"]):
            self._check(bearer_key(Headers(scope=scope)))
            scope[IS_OPERATOR] = True
        await self._app(scope, receive, send)

    def _check(self, given: str) -> None:
        if self._opens(given):
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
                "this route is the operator's, and the key given is not: set "
                "KVPAGING_OPERATOR_KEY and use that key, or give one the role operator in the file "
                "of KVPAGING_API_KEYS",
                code="operator_only",
            )
        raise ApiError(
            403,
            "this route is the operator's: the key given does not open it",
            code="operator_only",
        )

    def _opens(self, given: str) -> bool:
        if self._key is not None:
            return hmac.compare_digest(given.encode(), self._key)
        identity = None if self._keys is None else self._keys.identity_of(given)
        return identity is not None and identity.is_operator


def is_operators(path: str) -> bool:
    """Whether this path is an operator's."""
    return path in OPERATOR_PATHS or path.startswith(OPERATOR_PREFIX)


def bearer_key(headers: Headers) -> str:
    """Give the key that a request came with, or an empty text."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
