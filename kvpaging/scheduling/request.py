"""A request as the engine gets it: a frozen order in token ids.

Knows nothing of text. Limits are checked by `kvpaging.scheduling.admission`.
"""

from __future__ import annotations

import msgspec

from kvpaging.base.ids import RequestId
from kvpaging.cache.prefix_key import SharedPrefix
from kvpaging.cache.retention import AS_IT_IS, Retention

MAX_LOGPROBS = 20
MAX_PRIORITY = 100
"""Priorities run from `-MAX_PRIORITY` to `MAX_PRIORITY`; higher runs first."""


class SamplingParams(msgspec.Struct, frozen=True):
    """How the next token is chosen.

    The order is: logit_bias and penalties, temperature, top_k, top_p, min_p. With temperature 0 the
    most probable token is taken, the lowest id on a tie. Random numbers depend on
    (seed, output index, position) alone.
    """

    max_new_tokens: int
    seed: int
    """64-bit unsigned; the caller draws one where the client gave none."""
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output (Keskar et al. 2019, section 4.1)."""
    presence_penalty: float = 0.0
    """Over the output only, like `frequency_penalty`."""
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """`None`: none; k: the chosen token's and the k most probable ones', of the raw logits."""
    prompt_logprobs: int | None = None
    """The same for each prompt token after the first. They come with output 0 and cost prefix hits:
    logits can't be had of what was not computed."""


class Request(msgspec.Struct, frozen=True):
    """A frozen order; it forks into `n` sequences when its prompt is computed."""

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    n: int = 1
    priority: int = 0
    namespace: bytes = b""
    """Whose pages these are; pages of two namespaces never meet."""
    shared: SharedPrefix | None = None
    """The beginning of the prompt whose pages are of another namespace, which tenants share."""
    tenant: str = ""
    """Whom the request is counted to, by name. Says nothing of whose pages it finds."""
    tenant_pages: int | None = None
    """Pages that the tenant may have, in use and cached; `None`: as many as there are."""
    retention: Retention = AS_IT_IS
    is_idle: bool = False
    """It runs only while no other request waits or runs, and stops when one comes."""
    explain: bool = False
    """Its end says why of its prompt so much was found, and what was computed again."""
