"""Text Generation Inference's dialect: `inputs` and `parameters`.

Unknown fields are ignored, as TGI's clients expect; known ones that this server can't honour are
refused when they are set to something.
"""

from __future__ import annotations

from typing import Any, Final, NotRequired, Self

from pydantic import Field, model_validator
from typing_extensions import TypedDict

from kvpaging.scheduling.request import MAX_LOGPROBS, SamplingParams
from server.schemas.body import LenientModel
from server.schemas.explanation import EXPLAIN, Explanation
from server.schemas.fields import (
    CACHE_SALT_WORDS,
    CACHE_SCOPE_WORDS,
    MAX_TOP_K,
    CacheSalt,
    Penalty,
    StopStrings,
    seed_or_random,
)
from server.schemas.retention import CACHE_WORDS, CacheControl
from server.tenants import CacheScope

NOT_SUPPORTED: Final = (
    "adapter_id",
    "grammar",
    "typical_p",
    "watermark",
)


class TgiParameters(LenientModel):
    """How to complete. Without `do_sample` and any sampling field the choice is greedy."""

    max_new_tokens: int | None = Field(None, ge=1)
    do_sample: bool | None = None
    temperature: float | None = Field(None, gt=0, le=100)
    top_k: int | None = Field(None, ge=1, le=MAX_TOP_K)
    top_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    frequency_penalty: Penalty | None = None
    seed: int | None = Field(None, ge=0, lt=2**64)
    stop: StopStrings | None = None
    details: bool | None = None
    top_n_tokens: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    return_full_text: bool | None = None
    truncate: int | None = Field(None, ge=1, description="Keep only so many last prompt tokens.")
    best_of: int | None = Field(None, ge=1, le=1, description="Only 1 is supported.")
    typical_p: float | None = Field(None, description="Only 1 is supported.")
    watermark: bool | None = Field(None, description="Not supported.")
    adapter_id: Any | None = Field(None, description="Not supported.")
    grammar: Any | None = Field(None, description="Not supported.")
    decoder_input_details: bool | None = Field(
        None, description="With `details`: the prompt's tokens too. Not for streams."
    )

    cache_scope: CacheScope | None = Field(None, description=CACHE_SCOPE_WORDS)
    cache_salt: CacheSalt | None = Field(None, description=CACHE_SALT_WORDS)
    cache: CacheControl | None = Field(None, description=CACHE_WORDS)
    explain: bool | None = Field(None, description=f"With `details`: {EXPLAIN}")

    @model_validator(mode="after")
    def _refuse_what_we_cannot(self) -> Self:
        if self.explain and not self.details:
            raise ValueError("explain needs details to be true: the answer has no other place")
        for name in NOT_SUPPORTED:
            value = getattr(self, name)
            if value and not (name == "typical_p" and value == 1.0):
                raise ValueError(f"{name} is not supported by this server; leave it out")
        return self

    @property
    def is_greedy(self) -> bool:
        """TGI's rule: not when sampling is asked for, or a field changes the distribution."""
        is_changed = self.temperature not in (None, 1.0) or self.top_p not in (None, 1.0)
        return not (self.do_sample or is_changed or self.top_k)

    @property
    def wants_prefill(self) -> bool:
        """Whether the details shall have the prompt's tokens."""
        return bool(self.details and self.decoder_input_details)

    def sampling(self, max_new_tokens: int, *, with_logprobs: bool) -> SamplingParams:
        """Give how to choose tokens; the seed is drawn where none was given."""
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            seed=seed_or_random(self.seed),
            temperature=0.0 if self.is_greedy else (self.temperature or 1.0),
            top_k=self.top_k or 0,
            top_p=self.top_p or 1.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logprobs=(self.top_n_tokens or 0) if with_logprobs else None,
            prompt_logprobs=0 if self.wants_prefill else None,
        )


class TgiRequest(LenientModel):
    """Complete a text."""

    inputs: str
    parameters: TgiParameters | None = None
    stream: bool | None = None
    cache_scope: Any | None = Field(None, description="Belongs into `parameters`.")
    cache_salt: Any | None = Field(None, description="Belongs into `parameters`.")
    cache: Any | None = Field(None, description="Belongs into `parameters`.")

    @model_validator(mode="after")
    def _refuse_what_would_be_overlooked(self) -> Self:
        for name in ("cache_scope", "cache_salt", "cache"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} belongs into parameters")
        return self


class TgiToken(TypedDict):
    """One token of an output."""

    id: int
    text: str
    logprob: float | None
    special: bool


class TgiPrefillToken(TypedDict):
    """One token of the prompt; the first has no log-probability."""

    id: int
    text: str
    logprob: float | None


class TgiDetails(TypedDict):
    """What is known of a whole output."""

    finish_reason: str
    generated_tokens: int
    cached_tokens: int
    """Tokens of the prompt that were found in the cache."""
    seed: int | None
    prefill: list[TgiPrefillToken]
    tokens: list[TgiToken]
    top_tokens: NotRequired[list[list[TgiToken]]]
    explanations: NotRequired[list[Explanation]]


class TgiResponse(TypedDict):
    """The whole answer."""

    generated_text: str
    details: NotRequired[TgiDetails]


class TgiStreamDetails(TypedDict):
    """What is known at the end of a stream."""

    finish_reason: str
    generated_tokens: int
    input_length: int
    cached_tokens: int
    seed: int | None
    explanations: NotRequired[list[Explanation]]


class TgiStreamEvent(TypedDict):
    """One token of a stream; `generated_text` and `details` with the last."""

    index: int
    token: TgiToken
    top_tokens: NotRequired[list[TgiToken]]
    generated_text: str | None
    details: TgiStreamDetails | None
