"""The cache's part of `/metrics`, from the engine's last answer; `docs/http.md` lists it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Final

from prometheus_client.metrics_core import GaugeMetricFamily, HistogramMetricFamily, Metric

from kvpaging.cache.explanation import DEVICE
from kvpaging.cache.statistics import LOAD_BUCKETS_S, LoadTimes
from kvpaging.engine.messages import CacheStats
from kvpaging.levels.level import LevelStats
from server.observe import cache_report

PREFIX: Final = "kvpaging_cache_"


def gauges(stats: CacheStats) -> Iterator[Metric]:
    """Give what may go down: state, ratios, times."""
    levels = stats.below.levels
    names = (DEVICE, *levels)
    yield _gauge(
        "level_pages",
        "Pages in a level.",
        {
            DEVICE: stats.pages.get("cached", 0) + stats.pages.get("held", 0),
            **{name: level.num_pages for name, level in levels.items()},
        },
    )
    yield _gauge(
        "level_bytes",
        "Bytes that a level occupies.",
        {
            DEVICE: stats.page_bytes * sum(stats.pages.values()),
            **{name: level.num_bytes for name, level in levels.items()},
        },
    )
    yield _gauge(
        "level_capacity_bytes",
        "The bound of a level.",
        {
            DEVICE: stats.page_bytes * sum(stats.pages.values()),
            **{name: level.capacity_bytes for name, level in levels.items()},
        },
    )
    yield _gauge(
        "hit_ratio",
        "Share of prompts' full pages that came from a level.",
        {name: cache_report.hit_ratio(stats, name) for name in names},
    )
    yield _gauge(
        "access_seconds",
        "What a page of a level takes, as measured last.",
        {name: cache_report.access_s_per_page(stats, name) for name in names},
    )
    costs = [(name, cache_report.level_cost(stats, name)) for name in levels]
    yield _gauge(
        "found_ratio",
        "Of the pages that a level was believed to have, those it had, as measured last.",
        {name: cost.hit_ratio for name, cost in costs if cost is not None},
    )
    yield _gauge(
        "miss_seconds",
        "What a load takes that finds nothing, as measured last.",
        {name: cost.miss_s for name, cost in costs if cost is not None},
    )
    yield _gauge(
        "compression_ratio",
        "Bytes of payload for each byte written.",
        {name: cache_report.compression_ratio(level) for name, level in levels.items()},
    )
    for name, text, value in (
        ("compute_seconds", "What computing a page takes.", cache_report.compute_s_per_page(stats)),
        (
            "average_access_seconds",
            "Hit ratio times access time, and miss ratio times the time to compute; of a page.",
            cache_report.average_access_s(stats),
        ),
        ("saved_seconds", "Time to compute what was found, less the loads.", stats.saved_s),
        ("queued_bytes", "On the way to the levels.", stats.below.num_queued_bytes),
    ):
        family = GaugeMetricFamily(PREFIX + name, text)
        family.add_metric([], float("nan") if value is None else value)
        yield family


def totals(stats: CacheStats) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...], float]]:
    """Give what only grows: name, labels, their values, total."""
    yield "queried_pages", (), (), stats.queried_pages
    yield "recomputed_tokens", (), (), stats.num_recomputed_tokens
    yield "dropped_pages", (), (), stats.below.num_dropped_pages
    for choice, count in (
        ("load", stats.choices.num_loads),
        ("compute", stats.choices.num_refused),
    ):
        yield "load_choices", ("choice",), (choice,), count
    for reason, count in stats.missed_pages.items():
        yield "missed_pages", ("reason",), (reason,), count
    for level in (DEVICE, *stats.below.levels):
        yield "hit_pages", ("level",), (level,), stats.hit_pages.get(level, 0)
    for cause, count in stats.evictions.items():
        yield "evicted_pages", ("level", "reason"), (DEVICE, cause), count
    for name, level_stats in stats.below.levels.items():
        for cause, count in level_stats.evicted.items():
            yield "evicted_pages", ("level", "reason"), (name, cause), count
        yield from _level_totals(name, level_stats)


def _level_totals(
    name: str, level: LevelStats
) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...], float]]:
    for metric, value in (
        ("read_pages", level.hits),
        ("read_bytes", level.loaded_payload_bytes),
        ("read_seconds", level.load_s),
        ("written_pages", level.stored),
        ("written_bytes", level.stored_payload_bytes),
        ("written_seconds", level.store_s),
    ):
        yield metric, ("level",), (name,), value
    for kind, count in (
        ("late", level.late),
        ("refused", level.refused),
        ("corrupt", level.corrupt),
        ("failed", level.failures),
    ):
        yield "level_troubles", ("level", "kind"), (name, kind), count


def load_times(stats: CacheStats) -> Iterable[Metric]:
    """Give the histogram of what each level took for its part of a load."""
    family = HistogramMetricFamily(
        PREFIX + "load_seconds", "A level's part of one load.", labels=["level"]
    )
    for level in stats.below.levels:
        times = stats.load_times.get(level, LoadTimes())
        bounds = [*map(str, LOAD_BUCKETS_S), "+Inf"]
        buckets = list(zip(bounds, accumulate(times.counts), strict=True))
        family.add_metric([level], buckets, times.sum_s)
    yield family


def _gauge(name: str, text: str, values: dict[str, float | None]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=["level"])
    for level, value in values.items():
        if value is not None:
            family.add_metric([level], value)
    return family
