"""What the cache's counters come to: ratios, times and rates, level by level. See `docs/cache.md`.

Plain arithmetic over `CacheStats`; knows no HTTP and no Prometheus.
"""

from __future__ import annotations

from typing_extensions import TypedDict

from kvpaging.cache.explanation import DEVICE
from kvpaging.cache.load_costs import LevelCost
from kvpaging.cache.statistics import LOAD_BUCKETS_S, LoadTimes
from kvpaging.engine.messages import CacheStats
from kvpaging.levels.level import LevelStats


class HitReport(TypedDict):
    """Of the prompts that were placed so far."""

    queried: int
    hit: int
    hit_ratio: float


class LoadReport(TypedDict):
    """How long a level took for its part of each load."""

    count: int
    mean_ms: float | None
    buckets: list[tuple[float | None, int]]
    """(at most so many milliseconds, loads); `null`: longer than the last bound."""


class TransferReport(TypedDict):
    """What went to a level, or came from it."""

    pages: int
    bytes: int
    """Of payload."""
    seconds: float
    bytes_per_s: float | None
    """While it worked."""


class LevelReport(TypedDict):
    """One level below the device. `null` where only its server knows."""

    level: str
    pages: int | None
    bytes: int | None
    capacity_bytes: int | None
    hit_pages: int
    """Pages of prompts that came from there."""
    hit_ratio: float
    """Of all full pages of prompts."""
    access_ms_per_page: float | None
    """What a page takes that is there; `null` while none was loaded."""
    found_ratio: float | None
    """Of the pages that were believed to be there and asked for, the latest counting most: what the
    choice between loading and computing goes by; `null` while none was asked for."""
    miss_ms: float | None
    """What a load takes that finds nothing."""
    loads: LoadReport
    read: TransferReport
    written: TransferReport
    compression_ratio: float | None
    """Bytes of payload for each byte that is kept."""
    evicted_pages: dict[str, int]
    """By cause; empty where only its server knows."""
    late_pages: int
    refused_pages: int
    corrupt_pages: int
    failures: int


class DeviceReport(TypedDict):
    """The device's pages."""

    pages: dict[str, int]
    """By state."""
    page_bytes: int
    hit_pages: int
    hit_ratio: float
    evicted_pages: dict[str, int]
    """By cause."""


class ChoiceReport(TypedDict):
    """How often pages that a level has were loaded, and how often computed."""

    loaded: int
    computed: int


class CacheReport(TypedDict):
    """The cache since the engine process began."""

    page_size: int
    tokens: HitReport
    pages: HitReport
    missed_pages: dict[str, int]
    """Full pages of prompts that were computed, by reason, as explanations give it."""
    device: DeviceReport
    levels: list[LevelReport]
    compute_ms_per_page: float | None
    average_access_ms_per_page: float | None
    """Hit ratio times access time, over all levels, and miss ratio times the time to compute."""
    saved_s: float
    choices: ChoiceReport
    recomputed_tokens: int
    queued_bytes: int
    """On the way to the levels."""
    dropped_pages: int
    """That a level did not get, because its writing could not follow."""


def report(stats: CacheStats) -> CacheReport:
    """Give the whole picture."""
    compute_s = compute_s_per_page(stats)
    average_s = average_access_s(stats)
    return {
        "page_size": stats.page_size,
        "tokens": _hits(stats.queried_tokens, stats.hit_tokens),
        "pages": _hits(stats.queried_pages, sum(stats.hit_pages.values())),
        "missed_pages": stats.missed_pages,
        "device": {
            "pages": stats.pages,
            "page_bytes": stats.page_bytes,
            "hit_pages": stats.hit_pages.get(DEVICE, 0),
            "hit_ratio": hit_ratio(stats, DEVICE),
            "evicted_pages": stats.evictions,
        },
        "levels": [_level(stats, name, level) for name, level in stats.below.levels.items()],
        "compute_ms_per_page": _ms(compute_s),
        "average_access_ms_per_page": _ms(average_s),
        "saved_s": round(stats.saved_s, 6),
        "choices": {"loaded": stats.choices.num_loads, "computed": stats.choices.num_refused},
        "recomputed_tokens": stats.num_recomputed_tokens,
        "queued_bytes": stats.below.num_queued_bytes,
        "dropped_pages": stats.below.num_dropped_pages,
    }


def hit_ratio(stats: CacheStats, level: str) -> float:
    """Give the share of all prompts' full pages that came from this level."""
    return stats.hit_pages.get(level, 0) / max(1, stats.queried_pages)


def compute_s_per_page(stats: CacheStats) -> float | None:
    """Give what computing a page is measured to take; `None` while nothing was measured."""
    per_token = stats.choices.compute_s_per_token
    return None if per_token is None else per_token * stats.page_size


def access_s_per_page(stats: CacheStats, level: str) -> float | None:
    """Give what a page of this level is measured to take. The device's are read in place."""
    if level == DEVICE:
        return 0.0
    cost = level_cost(stats, level)
    return None if cost is None else cost.load_s_per_page


def level_cost(stats: CacheStats, level: str) -> LevelCost | None:
    """Give what the choice between loading and computing knows of a level; `None`: nothing yet."""
    return next((cost for cost in stats.choices.levels if cost.level == level), None)


def average_access_s(stats: CacheStats) -> float | None:
    """Give the average access time of a page; `None` while a part of it was not measured."""
    compute_s = compute_s_per_page(stats)
    if compute_s is None or not stats.queried_pages:
        return None
    total_s, miss_ratio = 0.0, 1.0
    for level in (DEVICE, *stats.below.levels):
        ratio = hit_ratio(stats, level)
        access_s = access_s_per_page(stats, level)
        if ratio and access_s is None:
            return None
        total_s += ratio * (access_s or 0.0)
        miss_ratio -= ratio
    return total_s + miss_ratio * compute_s


def compression_ratio(level: LevelStats) -> float | None:
    """Give the bytes of payload for each byte written; `None` while nothing was written."""
    return level.stored_payload_bytes / level.written_bytes if level.written_bytes else None


def _level(stats: CacheStats, name: str, level: LevelStats) -> LevelReport:
    cost = level_cost(stats, name)
    return {
        "level": name,
        "pages": level.num_pages,
        "bytes": level.num_bytes,
        "capacity_bytes": level.capacity_bytes,
        "hit_pages": stats.hit_pages.get(name, 0),
        "hit_ratio": hit_ratio(stats, name),
        "access_ms_per_page": _ms(access_s_per_page(stats, name)),
        "found_ratio": None if cost is None else cost.hit_ratio,
        "miss_ms": None if cost is None else _ms(cost.miss_s),
        "loads": _loads(stats.load_times.get(name, LoadTimes())),
        "read": _transfer(level.hits, level.loaded_payload_bytes, level.load_s),
        "written": _transfer(level.stored, level.stored_payload_bytes, level.store_s),
        "compression_ratio": compression_ratio(level),
        "evicted_pages": level.evicted,
        "late_pages": level.late,
        "refused_pages": level.refused,
        "corrupt_pages": level.corrupt,
        "failures": level.failures,
    }


def _hits(queried: int, hit: int) -> HitReport:
    return {"queried": queried, "hit": hit, "hit_ratio": hit / max(1, queried)}


def _loads(times: LoadTimes) -> LoadReport:
    count = sum(times.counts)
    bounds = [*(round(bound * 1000, 3) for bound in LOAD_BUCKETS_S), None]
    return {
        "count": count,
        "mean_ms": _ms(times.sum_s / count) if count else None,
        "buckets": list(zip(bounds, times.counts, strict=True)),
    }


def _transfer(num_pages: int, num_bytes: int, seconds: float) -> TransferReport:
    return {
        "pages": num_pages,
        "bytes": num_bytes,
        "seconds": round(seconds, 6),
        "bytes_per_s": num_bytes / seconds if seconds else None,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 6)
