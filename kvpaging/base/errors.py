"""Everything that the engine raises on purpose.

    KvPagingError
    + ConfigError              a setting, flag or checkpoint that can't be used; at start only
    |  + UnsupportedModel
    + BadRequest               the client can mend it; HTTP 400
    |  + PromptTooLong         prompt and output exceed the model's length
    |  + NeverFits             prompt and output exceed the whole pool
    |  + OverBudget            prompt and output exceed what the tenant may have
    |  + TooManyPinned         a pin exceeds what pins may hold
    |  + NoPins                pins may hold nothing here
    + Overloaded               the bounded queue is full; HTTP 429
    + EngineDied               the engine process ended under the request; HTTP 503
    + LawBroken                one of DESIGN's laws does not hold: our bug

A message says what, the limit, the value given, and the remedy where there is one.
"""

from __future__ import annotations


class KvPagingError(Exception):
    """The root of every error raised on purpose."""


class ConfigError(KvPagingError):
    """A setting or checkpoint that can't be used."""


class UnsupportedModel(ConfigError):
    """The checkpoint's architecture or one of its features is not supported."""


class BadRequest(KvPagingError):
    """The request can't be served as it was sent.

    `param` names the field at fault, `code` is stable and machine readable.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value"):
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class PromptTooLong(BadRequest):
    """Prompt plus requested output exceed the model's length."""

    def __init__(self, message: str, *, param: str = "prompt"):
        super().__init__(message, param=param, code="context_length_exceeded")


class NeverFits(BadRequest):
    """The sequence needs more pages than the whole pool has."""

    def __init__(self, needs: int, has: int, *, param: str = "prompt"):
        super().__init__(
            f"prompt and output need {needs} KV pages and the pool has {has}; "
            "shorten them or give the server more KV memory",
            param=param,
            code="pool_exceeded",
        )
        self.needs = needs
        self.has = has


class OverBudget(BadRequest):
    """The sequence needs more pages than its tenant may have."""

    def __init__(self, needs: int, has: int):
        super().__init__(
            f"prompt and output need {needs} KV pages and this tenant may have {has}; "
            "shorten them or give the tenant a larger budget",
            param="prompt",
            code="tenant_budget_exceeded",
        )


class TooManyPinned(BadRequest):
    """A pin would hold more pages than pins may."""

    def __init__(self, needs: int, limit: int, own: int | None):
        """`own`: what its tenant has pinned, where that meets the tenant's limit.

        Else the limit of all is met, and how much others pinned is not told.
        """
        room = (
            f"{own} of the {limit} that this tenant may pin are pinned"
            if own is not None
            else f"of the {limit} that all requests together may pin fewer are left"
        )
        super().__init__(
            f"the pin needs {needs} more KV pages, and {room}; give up other pins, shorten the "
            "prompt or raise the limit",
            param="cache",
            code="pin_limit_exceeded",
        )


class NoPins(BadRequest):
    """This server has no room for any pin."""

    def __init__(self, max_model_len: int, longest: int, num_pages: int):
        """`longest`: pages of one request of the model's length."""
        why = (
            f"one request of the model's length of {max_model_len} tokens takes {longest} of the "
            f"{num_pages} KV pages, and must always fit: a smaller --max-model-len or more KV "
            "memory leaves room"
            if longest >= num_pages
            else "--max-pinned-ratio leaves them no page"
        )
        super().__init__(
            f"pins may hold 0 KV pages on this server, because {why}",
            param="cache",
            code="pin_limit_exceeded",
        )


class Overloaded(KvPagingError):
    """The queue is full. `retry_after_s` is computed from the rate at which it drains."""

    def __init__(self, message: str, *, retry_after_s: float):
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class EngineDied(KvPagingError):
    """The engine process ended, or failed this request, before it was answered."""


class LawBroken(KvPagingError):
    """An invariant does not hold. Always our bug, never the client's."""
