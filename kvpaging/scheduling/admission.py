"""The door: a request that can't be served is refused at once, with the numbers.

An accepted request will be answered. Knows the limits, not the load: a full queue is the
scheduler's business.
"""

from __future__ import annotations

from kvpaging.base.config import SchedulerConfig
from kvpaging.base.errors import BadRequest, NeverFits, NoPins, OverBudget, PromptTooLong
from kvpaging.cache.retention import (
    AS_IT_IS,
    MAX_RETENTION_PRIORITY,
    MAX_TTL_S,
    NOT_AT_ALL,
)
from kvpaging.scheduling.request import MAX_LOGPROBS, MAX_PRIORITY, Request


def max_new_tokens_that_fit(num_prompt_tokens: int, config: SchedulerConfig) -> int:
    """The longest output that fits both the model and the pool; 0 or less when none does.

    The last sampled token needs no slot: nothing is computed from it.
    """
    by_pool = config.num_pages * config.page_size + 1 - num_prompt_tokens
    return min(config.max_model_len - num_prompt_tokens, by_pool)


def check(request: Request, config: SchedulerConfig, vocab_size: int) -> None:
    """Raise BadRequest (or PromptTooLong, NeverFits) if the request can never be served."""
    _check_prompt(request, vocab_size)
    if not 1 <= request.n <= config.max_num_seqs:
        raise BadRequest(f"n must be in 1..{config.max_num_seqs}, not {request.n}", param="n")
    _check_sampling(request, vocab_size)
    _check_retention(request, config)
    _check_length(request, config)


def _check_retention(request: Request, config: SchedulerConfig) -> None:
    retention = request.retention
    if retention == AS_IT_IS:
        return
    if abs(retention.priority) > MAX_RETENTION_PRIORITY:
        raise BadRequest(
            f"cache.priority must be in {-MAX_RETENTION_PRIORITY}..{MAX_RETENTION_PRIORITY}, "
            f"not {retention.priority}",
            param="cache",
        )
    if retention.ttl_s is not None and not 0 < retention.ttl_s <= MAX_TTL_S:
        raise BadRequest(
            f"cache.ttl_s must be above 0 and at most {MAX_TTL_S:g}, not {retention.ttl_s:g}",
            param="cache",
        )
    if not retention.store and retention != NOT_AT_ALL:
        raise BadRequest(
            "cache.store false keeps no page: pin, ttl_s and priority say nothing then",
            param="cache",
        )
    if retention.pin and not config.prefix_cache:
        raise BadRequest("a pin needs the prefix cache, which is off here", param="cache")
    if retention.pin and not config.max_pinned_pages:
        longest = -(-config.max_model_len // config.page_size)
        raise NoPins(config.max_model_len, longest, config.num_pages)
    num_tokens = len(request.prompt_token_ids)
    if retention.pin and num_tokens < config.page_size:
        raise BadRequest(
            f"a pin keeps full pages, and {num_tokens} tokens fill none of {config.page_size}",
            param="cache",
        )


def _check_prompt(request: Request, vocab_size: int) -> None:
    if not request.prompt_token_ids:
        raise BadRequest("the prompt is empty; it needs at least 1 token", param="prompt")
    for token_id in (min(request.prompt_token_ids), max(request.prompt_token_ids)):
        if not 0 <= token_id < vocab_size:
            raise BadRequest(
                f"token id {token_id} in the prompt is not in 0..{vocab_size - 1}", param="prompt"
            )
    if abs(request.priority) > MAX_PRIORITY:
        raise BadRequest(
            f"priority must be in {-MAX_PRIORITY}..{MAX_PRIORITY}, not {request.priority}",
            param="priority",
        )


def _check_sampling(request: Request, vocab_size: int) -> None:
    sampling = request.sampling

    def require(ok: bool, field: str, limit: str) -> None:
        if not ok:
            value = getattr(sampling, field)
            raise BadRequest(f"{field} must be {limit}, not {value}", param=field)

    require(sampling.max_new_tokens >= 1, "max_new_tokens", "at least 1")
    require(
        0 <= sampling.min_new_tokens <= sampling.max_new_tokens,
        "min_new_tokens",
        f"in 0..max_new_tokens ({sampling.max_new_tokens})",
    )
    require(0 <= sampling.seed < 2**64, "seed", "in 0..2**64 - 1")
    require(0 <= sampling.temperature <= 100, "temperature", "in 0..100")
    require(0 <= sampling.top_k < 2**31, "top_k", "in 0..2**31 - 1; 0 means all")
    require(0 < sampling.top_p <= 1, "top_p", "above 0 and at most 1")
    require(0 <= sampling.min_p <= 1, "min_p", "in 0..1")
    # Within these nothing overflows in float32.
    require(0.01 <= sampling.repetition_penalty <= 100, "repetition_penalty", "in 0.01..100")
    require(abs(sampling.presence_penalty) <= 100, "presence_penalty", "in -100..100")
    require(abs(sampling.frequency_penalty) <= 100, "frequency_penalty", "in -100..100")
    require(
        all(0 <= i < vocab_size and abs(b) <= 1e4 for i, b in sampling.logit_bias),
        "logit_bias",
        f"numbers in -10000..10000 for token ids in 0..{vocab_size - 1}",
    )
    require(
        all(0 <= i < vocab_size for i in sampling.stop_token_ids),
        "stop_token_ids",
        f"token ids in 0..{vocab_size - 1}",
    )
    for field in ("logprobs", "prompt_logprobs"):
        count = getattr(sampling, field)
        require(count is None or 0 <= count <= MAX_LOGPROBS, field, f"in 0..{MAX_LOGPROBS}")


def _check_length(request: Request, config: SchedulerConfig) -> None:
    num_prompt, num_new = len(request.prompt_token_ids), request.sampling.max_new_tokens
    if num_prompt + num_new > config.max_model_len:
        raise PromptTooLong(
            f"the prompt's {num_prompt} tokens and max_new_tokens={num_new} make "
            f"{num_prompt + num_new}, and the model's length is {config.max_model_len}",
            param="prompt" if num_prompt >= config.max_model_len else "max_new_tokens",
        )
    needs = -(-(num_prompt + num_new - 1) // config.page_size)
    if needs > config.num_pages:
        raise NeverFits(needs, config.num_pages)
    if request.tenant_pages is not None and needs > request.tenant_pages:
        raise OverBudget(needs, request.tenant_pages)
