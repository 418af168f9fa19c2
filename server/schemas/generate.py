"""`POST /generate` in its own dialect."""

from __future__ import annotations

from typing import Annotated, NotRequired, Self

from pydantic import Field, PlainValidator, model_validator
from typing_extensions import TypedDict

from kvpaging.scheduling.request import MAX_LOGPROBS, MAX_PRIORITY, SamplingParams
from server.schemas.body import StrictModel
from server.schemas.explanation import EXPLAIN, Explanation
from server.schemas.fields import (
    CACHE_SALT_WORDS,
    CACHE_SCOPE_WORDS,
    MAX_N,
    MAX_TOP_K,
    CacheSalt,
    LogitBias,
    Penalty,
    StopStrings,
    TokenId,
    TokenIds,
    logit_bias_pairs,
    seed_or_random,
    text_or_token_ids,
)
from server.schemas.retention import CACHE_WORDS, CacheControl
from server.tenants import CacheScope

Prompt = Annotated[
    str | list[int],
    PlainValidator(text_or_token_ids, json_schema_input_type=str | list[TokenId]),
]


class GenerateRequest(StrictModel):
    """Complete a prompt.

    Probabilities are changed in this order: logit_bias and penalties, temperature, top_k, top_p,
    min_p. Log-probabilities are those of the model before any of that.
    """

    prompt: Prompt = Field(description="Text, or token ids.")
    max_new_tokens: int | None = Field(
        None, ge=1, description="Default: what fits, at most 128. More than fits is refused."
    )
    min_new_tokens: int = Field(0, ge=0, description="No ending before so many tokens.")
    temperature: float = Field(1.0, ge=0, le=100, description="0: always the most probable token.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=MAX_TOP_K, description="0: all tokens.")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: LogitBias = Field(default_factory=dict, description="Token id to added logit.")
    seed: int | None = Field(
        None, ge=0, lt=2**64, description="The same request and seed give the same tokens."
    )
    n: int = Field(1, ge=1, le=MAX_N, description="Outputs.")
    stop: StopStrings = Field(
        default_factory=list,
        description="An output ends before the first of these in its text.",
    )
    stop_token_ids: TokenIds = Field(
        default_factory=list, description="An output ends with the first of these."
    )
    ignore_eos: bool = False
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="For each token its log-probability and so many of the most probable ones.",
    )
    stream: bool = False
    priority: int = Field(0, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="Higher runs first.")
    cache_scope: CacheScope = Field("tenant", description=CACHE_SCOPE_WORDS)
    cache_salt: CacheSalt = Field("", description=CACHE_SALT_WORDS)
    cache: CacheControl | None = Field(None, description=CACHE_WORDS)
    explain: bool = Field(False, description=EXPLAIN)

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens ({self.min_new_tokens}) must be at most max_new_tokens "
                f"({self.max_new_tokens})"
            )
        return self

    def sampling(self, max_new_tokens: int) -> SamplingParams:
        """Give how to choose tokens; the seed is drawn where none was given."""
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            seed=seed_or_random(self.seed),
            min_new_tokens=self.min_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=logit_bias_pairs(self.logit_bias),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
        )


class TopLogprob(TypedDict):
    """A token that could have been chosen."""

    token_id: int
    logprob: float


class TokenLogprob(TypedDict):
    """One token's log-probability, and the most probable tokens at its place."""

    token_id: int
    logprob: float
    top: list[TopLogprob]


class GenerateOutput(TypedDict):
    """One output. `token_ids` includes what ended it, `text` does not."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None
    logprobs: list[TokenLogprob] | None


class GenerateUsage(TypedDict):
    """Token counts; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class GenerateTimings(TypedDict):
    """Where the time went. `ttft_ms` includes tokenization and the way to the engine."""

    queue_ms: float
    ttft_ms: float
    prefill_ms: float
    decode_ms: float


class GenerateResponse(TypedDict):
    """The whole answer."""

    id: str
    model: str
    outputs: list[GenerateOutput]
    usage: GenerateUsage
    timings: GenerateTimings
    explanations: NotRequired[list[Explanation]]
    """With `explain`: one, for the prompt."""


class GenerateEvent(TypedDict):
    """One event of a stream: what is new of one output."""

    id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: str | None
    stop_reason: NotRequired[str | int | None]
    """With the output's last event only."""


class GenerateEnd(TypedDict):
    """The last event before `[DONE]`."""

    id: str
    usage: GenerateUsage
    timings: GenerateTimings
    explanations: NotRequired[list[Explanation]]
