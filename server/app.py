"""The HTTP application: routes, schemas and errors around one engine client.

    Envelope (id, errors, access log) > OperatorDoor > KeyCheck > routes

Nothing happens at import and nothing is global: two apps can live side by side. Knows nothing of
sockets, processes and settings.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, Route

from server.client import EngineClient
from server.envelope import Envelope, KeyCheck, error_response
from server.errors import answer_to
from server.observe.record import record_of
from server.operator_door import OperatorDoor
from server.routes import ROUTERS
from server.schemas import EVENTS, REQUEST_MODELS
from server.service import AppConfig, Service
from server.text import Text
from server.version import version

__all__ = ["AppConfig", "create_app"]

TITLE: Final = "kvpaging"
SCHEMA_REF: Final = "#/components/schemas/{model}"


def create_app(config: AppConfig, client: EngineClient, text: Text | None = None) -> FastAPI:
    """Make the application; `app.state.service` is its `Service`, which can be told to drain.

    Without `text` it is read from the engine's model directory when the first request needs it.
    """
    app = _App(
        title=TITLE, version=version(), separate_input_output_schemas=False, lifespan=_prepare
    )
    app.state.service = Service(config, client, text)
    app.state.drain = app.state.service.drain
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    if config.keys is not None:
        app.add_middleware(KeyCheck, keys=config.keys)
    if config.keys is not None or config.operator_key is not None:
        app.add_middleware(OperatorDoor, key=config.operator_key, keys=config.keys)
    app.add_middleware(Envelope)
    return app


@contextlib.asynccontextmanager
async def _prepare(app: FastAPI) -> AsyncIterator[None]:
    """Make now, while the engine loads, what FastAPI would make in the first request (0.1 s)."""
    app.openapi()
    service: Service = app.state.service
    if service.config.preload is not None:
        service.preloader.read(service.config.preload)
    yield
    await service.preloader.close()


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
                [(model, "validation") for model in REQUEST_MODELS], ref_template=SCHEMA_REF
            )
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(definitions["$defs"])
            for event in EVENTS:
                schema = TypeAdapter(event).json_schema(ref_template=SCHEMA_REF)
                schemas.update(schema.pop("$defs", {}))
                schemas[schema["title"]] = schema
            self.openapi_schema = document
        return self.openapi_schema


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """No such route, or not with this method."""
    answer = answer_to(error)
    if answer.status == 405:
        answer.headers["Allow"] = ", ".join(sorted(_methods_of(request)))
    record = record_of(request.scope)
    record.error = answer.code
    return error_response(answer, record.dialect)


def _methods_of(request: Request) -> set[str]:
    """Give the methods of all routes of this path; each route by itself knows only its own."""
    return {
        method
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, Route) and route.matches(request.scope)[0] is Match.PARTIAL
        for method in route.methods or ()
    }
