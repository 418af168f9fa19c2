"""Fields that several dialects share."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, Field

MAX_N: Final = 128
MAX_STOP_STRINGS: Final = 32
MAX_STOP_CHARS: Final = 1024
MAX_BIASES: Final = 4096
MAX_TOKEN_ID: Final = 2**31 - 1
"""More than any vocabulary; the model's own limit is checked with the engine's."""

Penalty = Annotated[float, Field(ge=-100, le=100)]

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_BIASES)]


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopStrings = Annotated[
    list[StopString],
    Field(max_length=MAX_STOP_STRINGS),
    BeforeValidator(_one_or_many, json_schema_input_type=StopString | list[StopString]),
]


def _check_biases(biases: dict[str, float]) -> dict[str, float]:
    for key in biases:
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise ValueError(f"{key[:20]!r} is not a token id")
    return biases


LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASES),
    AfterValidator(_check_biases),
]


def logit_bias_pairs(biases: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """Give (token id, bias), each id once: a later spelling of an id wins."""
    return tuple({int(key): bias for key, bias in biases.items()}.items())


def seed_or_random(seed: int | None) -> int:
    """Give the client's seed, as 64 bits without sign, or draw one that fits every JSON reader."""
    return secrets.randbits(53) if seed is None else seed % 2**64
