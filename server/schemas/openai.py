"""OpenAI's dialect: completions, chat completions, models.

Unknown fields are ignored, as its clients expect; known ones that this server can't honour are
refused when they are set to something. Beyond OpenAI's own fields the usual extensions of open
servers are taken: `top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `stop_token_ids`,
`ignore_eos`, `priority`, `chat_template_kwargs`; and this server's own `cache_scope`, `cache_salt`
and `explain`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, NotRequired, Self

from pydantic import Discriminator, Field, PlainValidator, Tag, model_validator
from typing_extensions import TypedDict

from kvpaging.scheduling.request import MAX_LOGPROBS, MAX_PRIORITY, SamplingParams
from server.schemas.body import LenientModel
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

MAX_PROMPTS: Final = 256
"""Of one call."""
MAX_MESSAGES: Final = 8192
MAX_PARTS: Final = 1024
"""Of one message."""

FIELD_NAMES: Final = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
"""The engine's names for fields, in this dialect's words."""


class StreamOptions(LenientModel):
    """What a stream carries besides text."""

    include_usage: bool | None = Field(default=None, description="One more event, with `usage`.")


class _Sampling(LenientModel):
    """The fields that both kinds of completion have. `null` means: not given."""

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=MAX_TOP_K, description="0 or -1: all tokens.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    n: int | None = Field(default=None, ge=1, le=MAX_N)
    stop: StopStrings | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    priority: int | None = Field(default=None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    cache_scope: CacheScope | None = Field(default=None, description=CACHE_SCOPE_WORDS)
    cache_salt: CacheSalt | None = Field(default=None, description=CACHE_SALT_WORDS)
    cache: CacheControl | None = Field(default=None, description=CACHE_WORDS)
    explain: bool | None = Field(default=None, description=EXPLAIN)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def num_outputs(self) -> int:
        """For each prompt."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with an event for `usage`."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_end(self) -> bool:
        """Whether a stream has one more event, for what is known at the end."""
        return self.includes_usage or bool(self.explain)

    def _sampling_params(
        self,
        max_new_tokens: int,
        num_logprobs: int | None,
        num_prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            seed=seed_or_random(self.seed),
            min_new_tokens=self.min_tokens or 0,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(0, self.top_k or 0),
            top_p=self.top_p or 1.0,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=logit_bias_pairs(self.logit_bias or {}),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=num_logprobs,
            prompt_logprobs=num_prompt_logprobs,
        )


def _prompts(value: Any) -> Any:
    """Tell the four forms of a prompt apart, cheaply and with one clear message."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return text_or_token_ids(value)
        if len(value) > MAX_PROMPTS:
            raise ValueError(f"at most {MAX_PROMPTS} prompts in one call, not {len(value)}")
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) for item in value):
            return [text_or_token_ids(item) for item in value]
    raise ValueError("must be a text, texts, token ids, or lists of token ids")


_Prompts = str | list[str] | list[TokenId] | list[list[TokenId]]


class CompletionRequest(_Sampling):
    """Complete one or several prompts. `max_tokens` is 16 when it is not given."""

    prompt: Annotated[
        str | list[str] | list[int] | list[list[int]],
        PlainValidator(_prompts, json_schema_input_type=_Prompts),
    ]
    max_tokens: int | None = Field(default=None, ge=0, description="0 with `echo` alone.")
    echo: bool | None = Field(
        default=None,
        description="The text begins with the prompt, and `logprobs` with the prompt's tokens.",
    )
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(default=None, description="Only the value of `n` is supported.")
    suffix: str | None = Field(default=None, description="Not supported.")

    @model_validator(mode="after")
    def _refuse_what_we_cannot(self) -> Self:
        if self.suffix:
            raise ValueError("suffix is not supported by this server; leave it out")
        if self.best_of is not None and self.best_of != self.num_outputs:
            raise ValueError(f"best_of must equal n ({self.num_outputs}), not {self.best_of}")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1 without echo, not 0")
        if self.max_tokens == 0 and self.min_tokens:
            raise ValueError(f"min_tokens must be in 0..max_tokens (0), not {self.min_tokens}")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token_id for token_id in self.prompt if isinstance(token_id, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]

    def sampling(self, max_new_tokens: int) -> SamplingParams:
        """Give how to choose tokens; the seed is drawn where none was given."""
        num_prompt_logprobs = self.logprobs if self.echo else None
        return self._sampling_params(max_new_tokens, self.logprobs, num_prompt_logprobs)


class ContentPart(LenientModel):
    """A part of a message; only text is supported."""

    type: str
    text: str | None = None


def _kind_of_content(content: Any) -> str | None:
    if isinstance(content, str):
        return "text"
    return "parts" if isinstance(content, list) else None


Content = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[ContentPart], Field(fail_fast=True, max_length=MAX_PARTS), Tag("parts")],
    Discriminator(
        _kind_of_content,
        custom_error_type="content",
        custom_error_message="must be a text or a list of parts",
    ),
]


class ChatMessage(LenientModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: str | None = None

    @model_validator(mode="after")
    def _refuse_what_we_cannot(self) -> Self:
        if isinstance(self.content, list):
            for part in self.content:
                if part.type != "text" or part.text is None:
                    raise ValueError(
                        f"content parts must be texts; {part.type[:40]!r} is not supported"
                    )
        return self

    def for_template(self) -> dict[str, str]:
        """Give the message as chat templates of text models expect it: content as one text."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text or "" for part in content)
        named = {"name": self.name} if self.name is not None else {}
        return {"role": self.role, "content": content, **named}


class ResponseFormat(LenientModel):
    """How the answer must look; only free text is supported."""

    type: str


class ChatCompletionRequest(_Sampling):
    """Continue a conversation. Without a length the answer may fill the context."""

    messages: list[ChatMessage] = Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(
        default=None, ge=1, description="The newer name of `max_tokens`."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = Field(default=None, description="Not supported.")
    functions: list[Any] | None = Field(default=None, description="Not supported.")
    modalities: list[str] | None = Field(
        default=None, fail_fast=True, description='Only `["text"]`.'
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Further variables for the model's chat template."
    )

    @model_validator(mode="after")
    def _refuse_what_we_cannot(self) -> Self:
        for name in ("tools", "functions"):
            if getattr(self, name):
                raise ValueError(f"{name} are not supported by this server; leave them out")
        if self.response_format is not None and self.response_format.type != "text":
            raise ValueError(
                f"response_format {self.response_format.type[:40]!r} is not supported; "
                "only 'text' is"
            )
        if self.modalities not in (None, [], ["text"]):
            raise ValueError("modalities other than text are not supported")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    @property
    def num_new_tokens(self) -> int | None:
        """The length that was asked for, by either name."""
        return self.max_completion_tokens or self.max_tokens

    def sampling(self, max_new_tokens: int) -> SamplingParams:
        """Give how to choose tokens; the seed is drawn where none was given."""
        num_logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling_params(max_new_tokens, num_logprobs)


class PromptTokensDetails(TypedDict):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class OpenAIUsage(TypedDict):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(TypedDict):
    """Parallel lists, one entry a token; a prompt's first token has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One output, or what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None


class CompletionResponse(TypedDict):
    """The whole answer; without `usage`, or with `null`, one event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[OpenAIUsage | None]
    explanations: NotRequired[list[Explanation]]
    """With `explain`: one for each prompt; in a stream with the last event."""


class ChatTopLogprob(TypedDict):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TypedDict):
    """One token's log-probability, and the most probable tokens at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(TypedDict):
    """One entry a token."""

    content: list[ChatTokenLogprob]


class ChatAnswer(TypedDict):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str


class ChatChoice(TypedDict):
    """One output."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None


class ChatCompletionResponse(TypedDict):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: OpenAIUsage
    explanations: NotRequired[list[Explanation]]
    """With `explain`: one, for the conversation."""


class ChatDelta(TypedDict):
    """What is new of the assistant's message."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChatChunkChoice(TypedDict):
    """What is new of one output."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: NotRequired[str | int | None]


class ChatCompletionChunk(TypedDict):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[OpenAIUsage | None]
    explanations: NotRequired[list[Explanation]]
    """With `explain`, with the last event."""


class Model(TypedDict):
    """A model that is served here."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None


class ModelList(TypedDict):
    """All models that are served here: one."""

    object: Literal["list"]
    data: list[Model]
