"""`/pins`: prefixes that a tenant keeps on the device."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator
from typing_extensions import TypedDict

from kvpaging.cache.retention import MAX_RETENTION_PRIORITY, MAX_TTL_S, Retention
from server.schemas.body import StrictModel
from server.schemas.fields import CACHE_SALT_WORDS, CACHE_SCOPE_WORDS, CacheSalt
from server.schemas.generate import Prompt
from server.schemas.openai import MAX_MESSAGES, ChatMessage
from server.tenants import CacheScope


class PrefixFields(StrictModel):
    """A prompt or a conversation whose pages are wanted."""

    prompt: Prompt | None = Field(None, description="Text, or token ids.")
    messages: list[ChatMessage] | None = Field(
        default=None, fail_fast=True, min_length=1, max_length=MAX_MESSAGES
    )
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    cache_scope: CacheScope = Field("tenant", description=CACHE_SCOPE_WORDS)
    cache_salt: CacheSalt = Field("", description=CACHE_SALT_WORDS)

    @model_validator(mode="after")
    def _check_one_of(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class PinRequest(PrefixFields):
    """Compute a prefix and pin its pages."""

    ttl_s: float | None = Field(
        None, gt=0, le=MAX_TTL_S, description="The pin ends after so many seconds."
    )
    priority: int = Field(
        0,
        ge=-MAX_RETENTION_PRIORITY,
        le=MAX_RETENTION_PRIORITY,
        description="Of its pages, when the pin has ended.",
    )

    def retention(self) -> Retention:
        """Give it as the engine has it."""
        return Retention(pin=True, ttl_s=self.ttl_s, priority=self.priority)


class Pin(TypedDict):
    """One pin. Pins that begin alike share pages."""

    id: str
    """Of the request that made it."""
    pages: int
    tokens: int
    computed: bool
    """false: its prompt is not computed yet."""
    ends_in_s: float | None


class NewPin(TypedDict):
    """A pin that was made."""

    id: str
    pages: int
    tokens: int
    cached_tokens: int
    """Tokens of the prompt that were there already."""


class PinsAnswer(TypedDict):
    """A tenant's pins, the oldest first."""

    page_size: int
    pins: list[Pin]


class TenantsPin(Pin):
    """One pin, for the operator."""

    tenant: str


class AllPinsAnswer(TypedDict):
    """All tenants' pins, the oldest first."""

    page_size: int
    max_pages: int
    """That all of them may hold."""
    pins: list[TenantsPin]


class Unpinned(TypedDict):
    """The pin has ended; its pages are cached like any others."""

    id: str
