"""For operators and orchestrators: is it alive, is it well, what is it, how is it doing."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter
from starlette.responses import Response
from typing_extensions import TypedDict

from server.client import EngineState, EngineStatus
from server.errors import ApiError
from server.observe.metrics import Metrics
from server.routes.answers import json_response
from server.schemas.errors import ErrorResponse
from server.service import Service, ServiceDep
from server.version import version

router: Final = APIRouter(tags=["operations"])

_UNAVAILABLE: Final[dict[int | str, dict[str, Any]]] = {
    503: {"model": ErrorResponse, "description": "`code` says why: `loading`, `stalled`, ..."}
}


class State(TypedDict):
    """A word for how it is."""

    status: str


class Version(TypedDict):
    """What runs here. Without an engine yet, `null`s."""

    version: str
    model: str
    architecture: str | None
    device: str | None
    dtype: str | None
    quantization: str | None
    """What linears' weights became when they were loaded; `null`: as they are."""
    kv_cache_dtype: str | None
    kernels: str | None
    exact: bool | None
    """Cached equals computed bit for bit on this path."""
    max_model_len: int | None
    max_num_seqs: int | None
    num_pages: int | None
    page_size: int | None


@router.get("/live", summary="The process answers", responses={200: {"model": State}})
async def live() -> Response:
    """Say so, whatever the engine does. For restarting a hung process."""
    return json_response(State(status="live"))


@router.get(
    "/health",
    summary="The engine is loaded and makes progress",
    responses={200: {"model": State}, **_UNAVAILABLE},
)
async def health(service: ServiceDep) -> Response:
    """Say so, or 503 with the code `loading`, `stalled` or `dead`."""
    _require_healthy(service.client.status())
    return json_response(State(status="healthy"))


@router.get(
    "/ready",
    summary="Healthy and not draining",
    responses={200: {"model": State}, **_UNAVAILABLE},
)
async def ready(service: ServiceDep) -> Response:
    """Say whether to send requests here."""
    _require_healthy(service.client.status())
    service.require_not_draining()
    return json_response(State(status="ready"))


@router.get("/version", summary="What runs here", responses={200: {"model": Version}})
async def version_(service: ServiceDep) -> Response:
    """Give version, model, device, numerics and limits."""
    return json_response(_version(service))


@router.get("/", summary="What runs here", responses={200: {"model": Version}})
async def root(service: ServiceDep) -> Response:
    """The same as `/version`, for people who open the address."""
    return json_response(_version(service))


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(service: ServiceDep) -> Response:
    """Give the metrics that `server.observe` lists; of an engine that is busy, the last known."""
    await service.look_at_cache()
    return Response(service.metrics.render(), headers={"Content-Type": Metrics.content_type})


def _version(service: Service) -> Version:
    config = service.client.status().config
    limits = config.scheduler if config else None
    return {
        "version": version(),
        "model": service.config.served_model_name,
        "architecture": config.architecture if config else None,
        "device": config.device if config else None,
        "dtype": config.dtype if config else None,
        "quantization": config.quantization if config else None,
        "kv_cache_dtype": config.kv_cache_dtype if config else None,
        "kernels": config.kernels if config else None,
        "exact": config.exact if config else None,
        "max_model_len": limits.max_model_len if limits else None,
        "max_num_seqs": limits.max_num_seqs if limits else None,
        "num_pages": limits.num_pages if limits else None,
        "page_size": limits.page_size if limits else None,
    }


def _require_healthy(status: EngineStatus) -> None:
    if status.state is not EngineState.READY:
        raise ApiError(
            503,
            f"{status.state}: {status.detail}",
            code=str(status.state),
            retry_after_s=2.0,
        )
