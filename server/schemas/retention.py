"""`cache`: what shall become of a prompt's pages, in every dialect."""

from __future__ import annotations

from typing import Final, Self

from pydantic import Field, model_validator

from kvpaging.cache.retention import AS_IT_IS, MAX_RETENTION_PRIORITY, MAX_TTL_S, Retention
from server.schemas.body import StrictModel

CACHE_WORDS: Final = "How long the request's cached pages shall stay."


class CacheControl(StrictModel):
    """How long a request's cached pages shall stay."""

    pin: bool = Field(False, description="The prompt's pages are not evicted, up to a bound.")
    ttl_s: float | None = Field(
        None, gt=0, le=MAX_TTL_S, description="Pages leave so many seconds after their last use."
    )
    store: bool = Field(True, description="false: nothing is kept when the request has ended.")
    priority: int = Field(
        0,
        ge=-MAX_RETENTION_PRIORITY,
        le=MAX_RETENTION_PRIORITY,
        description="Pages of a lower priority are evicted first.",
    )

    @model_validator(mode="after")
    def _check_store(self) -> Self:
        if not self.store and (self.pin or self.ttl_s is not None or self.priority):
            raise ValueError("store false keeps no page: pin, ttl_s and priority say nothing then")
        return self

    def retention(self) -> Retention:
        """Give it as the engine has it."""
        return Retention(self.store, self.pin, self.ttl_s, self.priority)


def retention_of(cache: CacheControl | None) -> Retention:
    """Give what was asked for, or the ordinary."""
    return AS_IT_IS if cache is None else cache.retention()
