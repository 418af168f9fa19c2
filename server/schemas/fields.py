"""Fields that several dialects share."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Final, Protocol

from pydantic import AfterValidator, BeforeValidator, Field

from server.tenants import CacheScope

MAX_N: Final = 128
MAX_STOP_STRINGS: Final = 32
MAX_STOP_CHARS: Final = 1024
MAX_SALT_CHARS: Final = 1024
MAX_BIASES: Final = 1024
MAX_TOKEN_ID: Final = 2**31 - 1
"""More than any vocabulary; the model's own limit is checked with the engine's."""

MAX_TOP_K: Final = 2**31 - 1
"""More than any vocabulary, and what the engine's numbers hold."""

CACHE_SCOPE_WORDS: Final = (
    "Whose cached pages: this tenant's, or, where the operator allows it, all tenants' for what "
    "the prompt begins with."
)
CACHE_SALT_WORDS: Final = "Any text: only requests with the same one share cached pages."

Penalty = Annotated[float, Field(ge=-100, le=100)]

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_BIASES)]


def _short_salt(salt: str) -> str:
    if len(salt) > MAX_SALT_CHARS:
        raise ValueError(f"must have at most {MAX_SALT_CHARS} characters, not {len(salt)}")
    return salt


CacheSalt = Annotated[str, AfterValidator(_short_salt)]


class CacheFields(Protocol):
    """A request that says whose pages it is about."""

    @property
    def cache_scope(self) -> CacheScope | None:
        """`None`: the tenant's."""

    @property
    def cache_salt(self) -> str | None:
        """What parts the pages further."""


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopStrings = Annotated[
    list[StopString],
    Field(fail_fast=True, max_length=MAX_STOP_STRINGS),
    BeforeValidator(_one_or_many, json_schema_input_type=StopString | list[StopString]),
]


def text_or_token_ids(value: Any) -> str | list[int]:
    """Check a prompt: a text, or token ids that can be ids. Raises `ValueError`."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(item) is int for item in value):
        for end in (min(value, default=0), max(value, default=0)):
            if not 0 <= end <= MAX_TOKEN_ID:
                raise ValueError(f"token id {str(end)[:24]} is not in 0..{MAX_TOKEN_ID}")
        return value
    raise ValueError("must be a text or a list of token ids")


def _few_biases(biases: Any) -> Any:
    """Count before anything is looked at: a dictionary's faults are all collected."""
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise ValueError(f"at most {MAX_BIASES} token ids, not {len(biases)}")
    return biases


def _check_biases(biases: dict[str, float]) -> dict[str, float]:
    for key in biases:
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise ValueError(f"{key[:20]!r} is not a token id")
    return biases


LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASES),
    BeforeValidator(_few_biases),
    AfterValidator(_check_biases),
]


def logit_bias_pairs(biases: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """Give (token id, bias), each id once: a later spelling of an id wins."""
    return tuple({int(key): bias for key, bias in biases.items()}.items())


def seed_or_random(seed: int | None) -> int:
    """Give the client's seed, as 64 bits without sign, or draw one that fits every JSON reader."""
    return secrets.randbits(53) if seed is None else seed % 2**64
