"""`/cache/preload`, and the lines of `--preload`'s file."""

from __future__ import annotations

from typing import Final, Literal, Self

from pydantic import Field, model_validator
from typing_extensions import TypedDict

from server.schemas.body import StrictModel
from server.schemas.pins import PrefixFields
from server.schemas.retention import CACHE_WORDS, CacheControl

MAX_ITEMS: Final = 1024
"""Of one call."""


class PreloadItem(PrefixFields):
    """One prefix to compute ahead."""

    tenant: str | None = Field(
        None,
        max_length=64,
        description="For whom: the name of a tenant that some API key stands for. May be left out "
        "where there is one tenant.",
    )
    cache: CacheControl | None = Field(None, description=CACHE_WORDS)

    @model_validator(mode="after")
    def _check_kept(self) -> Self:
        if self.cache is not None and not self.cache.store:
            raise ValueError("cache.store must be true: nothing else is the use of preloading")
        return self


class PreloadRequest(StrictModel):
    """Prefixes to compute ahead, while nobody else needs the engine."""

    items: list[PreloadItem] = Field(fail_fast=True, min_length=1, max_length=MAX_ITEMS)


class PreloadStatus(TypedDict):
    """How far preloading is, since the server began."""

    state: Literal["idle", "working"]
    now: str | None
    """What is computed now: a file's line, or an item of a call."""
    waiting: int
    """Prefixes of calls that wait."""
    file: str | None
    """Where the file is being read; `null` when it is done."""
    done: int
    failed: int
    tokens: int
    """Of the prefixes that are done."""
    cached_tokens: int
    """Of those, tokens that were there before."""
    errors: list[str]
    """The last ones."""
