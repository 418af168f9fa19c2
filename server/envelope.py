"""What every request gets, whatever its route: an id, a key check, a log line, and an answer.

Plain ASGI, so that streams and disconnects pass through untouched. Knows no route and no body.
"""

from __future__ import annotations

import logging
from typing import Final, cast
from urllib.parse import quote

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, ClientGone, Dialect, ErrorAnswer, answer_to
from server.keys import ANONYMOUS, Identity, Keys
from server.observe.record import RequestRecord, attach, record_of, request_id_from
from server.operator_door import IS_OPERATOR, bearer_key

REQUEST_ID_HEADER: Final = "X-Request-Id"
OPEN_PATHS: Final = frozenset({"/live", "/health", "/ready", "/pages/view"})
"""For load balancers and orchestrators, which have no key; and a page that asks for one itself."""
TGI_PATHS: Final = frozenset({"/", "/generate_stream"})
"""Errors here are in TGI's words even before the body is read."""
MAX_SHOWN_PATH_CHARS: Final = 200
_IDENTITY: Final = "kvpaging.identity"

_access_log: Final = logging.getLogger("server.access")
_logger: Final = logging.getLogger(__name__)


def error_response(answer: ErrorAnswer, dialect: Dialect) -> Response:
    """Give the error in the words of this dialect."""
    return Response(
        msgspec.json.encode(answer.body_in(dialect)),
        answer.status_in(dialect),
        headers=answer.headers,
        media_type="application/json",
    )


class Envelope:
    """Gives each request its id and its log line, and answers whatever the app raises.

    An error after the answer began can't be told any more: the connection ends unfinished.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an HTTP request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(request_id_from(Headers(scope=scope).get(REQUEST_ID_HEADER)))
        if scope["path"] in TGI_PATHS:
            record.dialect = Dialect.TGI
        attach(scope, record)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = record.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # noqa: BLE001 (every error is answered, an unknown one logged)
            await self._answer(error, record, scope, receive, send_with_id)
        finally:
            _log_access(scope, record)

    async def _answer(
        self, error: Exception, record: RequestRecord, scope: Scope, receive: Receive, send: Send
    ) -> None:
        answer = answer_to(error)
        if answer.status == 500:
            _logger.error(
                "%s %s failed",
                scope["method"],
                _shown_path(scope),
                exc_info=error,
                extra={"request_id": record.request_id},
            )
        record.error = answer.code
        if record.status == 0 and isinstance(error, ClientGone):
            record.status = answer.status
        elif record.status == 0:
            await error_response(answer, record.dialect)(scope, receive, send)


def _log_access(scope: Scope, record: RequestRecord) -> None:
    _access_log.info(
        "%s %s %d",
        scope["method"],
        _shown_path(scope),
        record.status,
        extra={"request_id": record.request_id} | record.fields(),
    )


def _shown_path(scope: Scope) -> str:
    """Give the path for a log line: quoted, so that it can't look like another line, and short."""
    return quote(scope["path"])[:MAX_SHOWN_PATH_CHARS]


class KeyCheck:
    """Refuses requests without one of the keys (`Authorization: Bearer KEY`), but on open paths."""

    def __init__(self, app: ASGIApp, keys: Keys):
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request with a key on, and remember whose it is."""
        if scope["type"] != "http" or self._is_open(scope):
            await self._app(scope, receive, send)
            return
        record = record_of(scope)
        identity = self._keys.identity_of(bearer_key(Headers(scope=scope)))
        if identity is None:
            answer = answer_to(
                ApiError(
                    401,
                    "a valid API key is needed: send `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            )
            record.error = answer.code
            await error_response(answer, record.dialect)(scope, receive, send)
            return
        scope[_IDENTITY], record.tenant = identity, identity.tenant
        await self._app(scope, receive, send)

    @staticmethod
    def _is_open(scope: Scope) -> bool:
        return scope["path"] in OPEN_PATHS or scope.get(IS_OPERATOR, False)


def identity_of(scope: Scope) -> Identity:
    """Give who sent the request that this scope belongs to."""
    return cast(Identity, scope.get(_IDENTITY, ANONYMOUS))
