"""Why a prompt was found in the cache, or not: the same in every dialect. See `docs/cache.md`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NotRequired

from typing_extensions import TypedDict

from kvpaging.cache.explanation import CacheExplanation, LevelMatch, LoadNote, MissedRun
from kvpaging.scheduling.outputs import Recomputed

EXPLAIN: Final = "Say at the end, for each prompt, what was found in the cache and why not more."

_POLICIES_BELOW: Final = {"host": "lru", "disk": "lru"}
"""How levels below the device choose what leaves them."""


class Mismatch(TypedDict):
    """The first page that was not found, and its first token; both count from 0."""

    page: int
    token: int


class LevelExplanation(TypedDict):
    """One level, asked for what the levels before it had not."""

    level: str
    pages: int
    """Pages that came from there."""
    pages_left: int
    """Pages that are there and were computed all the same; `missed` says why."""
    first_mismatch: Mismatch | None
    """`null`: it had everything that it was asked for."""
    missed: list[MissedTokens]
    """What it had not of what it was asked for, and why."""


class MissedTokens(TypedDict):
    """Tokens of the prompt, one after the other, that were computed for one reason."""

    reason: str
    first_token: int
    tokens: int
    level: NotRequired[str]
    """Of `evicted`: the level that it left last."""
    cause: NotRequired[str]
    """Of `evicted`: `room`, `flush`, ..."""
    policy: NotRequired[str]
    """Which policy of that level chose it, where the cause is `room`."""
    evicted_s_ago: NotRequired[float]


class LoadExplanation(TypedDict):
    """Whether to load pages or to compute them, and what came of it.

    What a page takes to load and to compute is measured over all tenants: it is the operator's.
    """

    pages_below: int
    """Pages that levels below the device were believed to have ..."""
    pages_asked: int
    """... of which so many were worth loading ..."""
    pages_loaded: int
    """... and so many came."""
    load_ms: float


class RecomputedTokens(TypedDict):
    """What a preemption cost one output."""

    output: int
    first_token: int
    tokens: int


class Explanation(TypedDict):
    """One prompt's. `cached_tokens` and the tokens of `missed` together are `prompt_tokens`."""

    prompt_tokens: int
    cached_tokens: int
    page_size: int
    levels: list[LevelExplanation]
    first_mismatch: Mismatch | None
    """On no level."""
    missed: list[MissedTokens]
    load: LoadExplanation | None
    recomputed: list[RecomputedTokens]


def explanation_of(
    told: CacheExplanation, recomputed: Sequence[tuple[int, Recomputed]], policy: str
) -> Explanation:
    """Give the wire format of an explanation; `recomputed` has each one's output."""
    size = told.page_size
    is_whole = told.num_cached_tokens // size >= (told.num_tokens - 1) // size
    return {
        "prompt_tokens": told.num_tokens,
        "cached_tokens": told.num_cached_tokens,
        "page_size": size,
        "levels": [_level(level, size, policy) for level in told.levels],
        "first_mismatch": None if is_whole else _mismatch(told.num_cached_tokens // size, size),
        "missed": [_missed(run, policy) for run in told.missed],
        "load": None if told.load is None else _load(told.load),
        "recomputed": [
            {"output": output, "first_token": one.first_token, "tokens": one.num_tokens}
            for output, one in recomputed
        ],
    }


def _level(level: LevelMatch, size: int, policy: str) -> LevelExplanation:
    first = level.first_mismatch
    return {
        "level": level.level,
        "pages": level.num_pages,
        "pages_left": level.num_left,
        "first_mismatch": None if first is None else _mismatch(first, size),
        "missed": [_missed(run, policy) for run in level.missed],
    }


def _mismatch(page: int, size: int) -> Mismatch:
    return {"page": page, "token": page * size}


def _missed(run: MissedRun, policy: str) -> MissedTokens:
    missed: MissedTokens = {
        "reason": run.reason,
        "first_token": run.first_token,
        "tokens": run.num_tokens,
    }
    if run.cause is not None and run.level is not None:
        missed["level"] = run.level
        missed["cause"] = run.cause
        if run.cause == "room":
            missed["policy"] = _POLICIES_BELOW.get(run.level, policy)
    if run.evicted_ago_s is not None:
        missed["evicted_s_ago"] = round(run.evicted_ago_s, 3)
    return missed


def _load(note: LoadNote) -> LoadExplanation:
    return {
        "pages_below": note.num_below,
        "pages_asked": note.num_asked,
        "pages_loaded": note.num_loaded,
        "load_ms": _ms(note.elapsed_s),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
