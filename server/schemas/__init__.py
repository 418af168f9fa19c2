"""The wire formats: what a client may send, validated, and what it gets back.

Requests are pydantic models; answers are typed dictionaries, so that a token's event costs no
validation. Knows no engine state.
"""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel

from server.schemas.generate import GenerateEnd, GenerateEvent, GenerateRequest
from server.schemas.openai import ChatCompletionChunk, ChatCompletionRequest, CompletionRequest
from server.schemas.pins import PinRequest
from server.schemas.preload import PreloadRequest
from server.schemas.tgi import TgiRequest, TgiStreamEvent
from server.schemas.tokens import DetokenizeRequest, TgiTokenizeRequest, TokenizeRequest

REQUEST_MODELS: Final[tuple[type[BaseModel], ...]] = (
    GenerateRequest,
    TgiRequest,
    CompletionRequest,
    ChatCompletionRequest,
    TokenizeRequest,
    TgiTokenizeRequest,
    DetokenizeRequest,
    PinRequest,
    PreloadRequest,
)

EVENTS: Final[tuple[type, ...]] = (GenerateEvent, GenerateEnd, ChatCompletionChunk, TgiStreamEvent)
"""What streams carry; the answers that come whole are named by their routes."""
