"""`/tokenize` and `/detokenize`, in the shapes of vLLM, and TGI's `/tokenize` and `/info`."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import FailFast, Field, model_validator
from typing_extensions import TypedDict

from server.schemas.body import LenientModel, StrictModel
from server.schemas.fields import TokenId
from server.schemas.openai import MAX_MESSAGES, ChatMessage


class TokenizeRequest(StrictModel):
    """Show how a prompt, or a conversation, is read."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(
        default=None, fail_fast=True, min_length=1, max_length=MAX_MESSAGES
    )
    add_special_tokens: bool = Field(
        default=True, description="With what the tokenizer puts around a prompt."
    )
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_one_of(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class TokenizeResponse(TypedDict):
    """The token ids, and how many the model can hold."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(StrictModel):
    """Show what token ids say."""

    tokens: Annotated[list[TokenId], FailFast()]
    skip_special_tokens: bool = False


class DetokenizeResponse(TypedDict):
    """The text."""

    prompt: str


class TgiTokenizeRequest(LenientModel):
    """TGI's question: which token is which part of the text."""

    inputs: str


class TgiTokenSpan(TypedDict):
    """A token and its place in the text, in characters."""

    id: int
    text: str
    start: int
    stop: int


class TgiInfo(TypedDict):
    """What TGI's clients want to know of a server."""

    model_id: str
    model_dtype: str
    model_device_type: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    max_client_batch_size: int
    router: str
    version: str
