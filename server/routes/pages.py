"""A live picture of the KV pages: the numbers as JSON, and a page that draws them.

Says how pages are used and by how many, never what is in them or whose they are.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response
from typing_extensions import TypedDict

from kvpaging.engine.messages import PagePicture
from server.routes.answers import json_response
from server.schemas.errors import ErrorResponse
from server.service import ServiceDep
from server.sse import until_gone

router: Final = APIRouter(tags=["operations"])


class Pages(TypedDict):
    """Every page, in the order of its id; page ids begin with 1."""

    page_size: int
    states: str
    """One letter a page: `f`ree, `c`ached, `h`eld, `q`uarantined."""
    shared: dict[int, int]
    """Owners of pages with more than one."""
    partial: dict[int, int]
    """Tokens in held pages that are not full."""


@router.get(
    "/pages",
    summary="Every KV page as it is now",
    responses={200: {"model": Pages}, 503: {"model": ErrorResponse}},
)
async def pages(request: Request, service: ServiceDep) -> Response:
    """Give state, owners and fill of each page, as of about a second ago."""
    service.engine_config()
    return json_response(_pages(await until_gone(request.receive, service.pages())))


@router.get("/pages/view", summary="The same, drawn", response_class=HTMLResponse)
async def view() -> Response:
    """Give a page that asks `/pages` every second."""
    html = files("server").joinpath("static/pages.html").read_text(encoding="utf-8")
    return HTMLResponse(html, headers={"Cache-Control": "no-cache"})


def _pages(picture: PagePicture) -> Pages:
    return {
        "page_size": picture.page_size,
        "states": "".join(page.state[0] for page in picture.pages),
        "shared": {page.page_id: page.num_owners for page in picture.pages if page.num_owners > 1},
        "partial": {
            page.page_id: page.num_tokens
            for page in picture.pages
            if page.state == "held" and page.num_tokens < picture.page_size
        },
    }
