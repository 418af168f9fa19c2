"""The HTTP application: routes, schemas and errors around one engine client.

    Envelope (id, errors, access log) > KeyCheck > routes

Nothing happens at import and nothing is global: two apps can live side by side. Knows nothing of
sockets, processes and settings.
"""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.client import EngineClient
from server.envelope import Envelope, KeyCheck, error_response
from server.errors import answer_to
from server.observe.record import record_of
from server.routes import ROUTERS
from server.schemas import REQUEST_MODELS
from server.service import AppConfig, Service
from server.text import Text
from server.version import version

__all__ = ["AppConfig", "create_app"]

TITLE: Final = "kvpaging"


def create_app(config: AppConfig, client: EngineClient, text: Text | None = None) -> FastAPI:
    """Make the application; `app.state.service` is its `Service`, which can be told to drain.

    Without `text` it is read from the engine's model directory when the first request needs it.
    """
    app = _App(title=TITLE, version=version(), separate_input_output_schemas=False)
    app.state.service = Service(config, client, text)
    app.state.drain = app.state.service.drain
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    if config.api_keys:
        app.add_middleware(KeyCheck, keys=config.api_keys)
    app.add_middleware(Envelope)
    return app


class _App(FastAPI):
    """FastAPI, with the models of the bodies that the routes read themselves in its document."""

    def openapi(self) -> dict[str, Any]:
        """Give the OpenAPI document, made at the first call."""
        if self.openapi_schema is None:
            document = get_openapi(
                title=self.title,
                version=self.version,
                summary="A paged KV-cache inference server",
                routes=self.routes,
            )
            _, definitions = models_json_schema(
                [(model, "validation") for model in REQUEST_MODELS],
                ref_template="#/components/schemas/{model}",
            )
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(definitions["$defs"])
            self.openapi_schema = document
        return self.openapi_schema


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """No such route, or not with this method."""
    answer = answer_to(error)
    record = record_of(request.scope)
    record.error = answer.code
    return error_response(answer, record.dialect)
