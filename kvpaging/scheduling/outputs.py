"""What a step gives back to whoever asked: tokens, endings and refusals."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from kvpaging.base.ids import RequestId
from kvpaging.cache.explanation import CacheExplanation
from kvpaging.scheduling.plan import Sample


class FinishReason(StrEnum):
    """How an output ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Timings(msgspec.Struct, frozen=True):
    """Intervals on the engine's clock, in seconds."""

    queue_s: float
    """From arrival to the first step that computed a token of it."""
    prefill_s: float
    """From there to the first sampled token."""
    decode_s: float
    """From there to the last."""


class Recomputed(msgspec.Struct, frozen=True, array_like=True):
    """Tokens that were computed again after a preemption."""

    first_token: int
    num_tokens: int


class Finished(msgspec.Struct, frozen=True):
    """One output's end."""

    reason: FinishReason
    stop_token_id: int | None
    """The token that ended it, where one did; it is the last of the output's tokens."""
    timings: Timings
    num_preemptions: int
    num_recomputed_tokens: int
    message: str | None = None
    """Why, for `ERROR`."""
    explanation: CacheExplanation | None = None
    """Where the request asked for it; of the prompt, so each of its outputs has the same."""
    recomputed: tuple[Recomputed, ...] = ()
    """Where the request asked for it: what preemptions cost this output."""


class SequenceOutput(msgspec.Struct, frozen=True):
    """What one step added to one output."""

    request_id: RequestId
    output_index: int
    samples: tuple[Sample, ...]
    num_cached_tokens: int
    """Prompt tokens that were found in the prefix cache when the request was first scheduled."""
    finished: Finished | None = None
    prompt_samples: tuple[Sample, ...] = ()
    """The prompt's next tokens with their log-probabilities, from the second one on and each once;
    all of them come before or with the first sample."""


class Rejection(msgspec.Struct, frozen=True):
    """A request that was not accepted, and why."""

    request_id: RequestId
    message: str
    code: str
    """`context_length_exceeded`, `pool_exceeded`, `overloaded`, `invalid_value`, ..."""
    param: str | None = None


class Flushed(msgspec.Struct, frozen=True):
    """A `Flush` is over."""

    query_id: int
    pages: dict[str, int | None]
    """Pages that were forgotten, by level; `None` where only its server knows. A level that is
    neither here nor in `failed` is not there."""
    failed: tuple[str, ...] = ()
    """Levels that could not be emptied, and may have pages still."""


class StepOutputs(msgspec.Struct, frozen=True):
    """Everything that one step has to say."""

    outputs: tuple[SequenceOutput, ...] = ()
    rejections: tuple[Rejection, ...] = ()
    flushed: tuple[Flushed, ...] = ()
