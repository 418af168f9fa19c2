"""One module a dialect: from a validated request to orders, from deltas to its wire format.

Routes decide nothing: limits are the engine's, endings are `server.generation`'s.
"""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter

from server.routes import (
    cache,
    chat,
    completions,
    generate,
    openai,
    operations,
    pages,
    pins,
    preload,
    tgi,
    tokens,
)

ROUTERS: Final[tuple[APIRouter, ...]] = (
    generate.router,
    tgi.router,
    openai.router,
    completions.router,
    chat.router,
    tokens.router,
    operations.router,
    pages.router,
    cache.router,
    pins.router,
    preload.router,
)
