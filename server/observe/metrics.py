"""What `/metrics` says, in the Prometheus text format; `docs/http.md` lists it.

Engine state is read from `EngineStats` when scraped, so it agrees with the allocator at that
moment. Tokens and requests are counted where they are told to a client, so the counters equal the
sums of all `usage` fields. One registry an app; nothing is global.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvpaging.engine.messages import CacheStats
from server.client import EngineStatus
from server.observe import cache_metrics

FINISH_REASONS: Final = ("stop", "length", "abort", "error")

_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)


class Metrics:
    """One app's metrics."""

    content_type: Final = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, status: Callable[[], EngineStatus]):
        registry = self._registry = CollectorRegistry()
        self._engine = _EngineCollector(status)
        registry.register(self._engine)
        self.prompt_tokens = Counter(
            "kvpaging_prompt_tokens", "Prompt tokens of answered requests.", registry=registry
        )
        self.generation_tokens = Counter(
            "kvpaging_generation_tokens", "Tokens of outputs, as in usage.", registry=registry
        )
        self._requests = Counter(
            "kvpaging_requests", "Ended outputs.", ["finish_reason"], registry=registry
        )
        for reason in FINISH_REASONS:
            self._requests.labels(reason)
        self._rejected = Counter(
            "kvpaging_rejected_requests",
            "Generation requests that were refused.",
            ["code"],
            registry=registry,
        )
        self._preloaded = Counter(
            "kvpaging_preloaded_prefixes",
            "Prefixes that were to be computed ahead.",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("done", "failed"):
            self._preloaded.labels(outcome)
        self.time_to_first_token = Histogram(
            "kvpaging_time_to_first_token_seconds",
            "From arrival to the first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.inter_token_latency = Histogram(
            "kvpaging_inter_token_latency_seconds",
            "Between two tokens of one output.",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self.e2e_latency = Histogram(
            "kvpaging_e2e_request_latency_seconds",
            "From arrival to the last token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.queue_time = Histogram(
            "kvpaging_queue_time_seconds",
            "From arrival to the first computed token.",
            buckets=_SECONDS,
            registry=registry,
        )

    def finished(self, finish_reason: str) -> None:
        """One output ended."""
        self._requests.labels(finish_reason).inc()

    def rejected(self, code: str) -> None:
        """One request was refused."""
        self._rejected.labels(code).inc()

    def see_cache(self, stats: CacheStats, num_restarts: int) -> None:
        """Show these of the cache as long as the engine isn't restarted once more."""
        self._engine.cache = (stats, num_restarts)

    def preloaded(self, outcome: str) -> None:
        """One prefix was computed ahead (`done`), or could not be (`failed`)."""
        self._preloaded.labels(outcome).inc()

    def render(self) -> bytes:
        """Give everything in the text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """The engine's own numbers at the moment of the scrape.

    Its totals start from zero with each engine process: what an ended process had counted when it
    was last seen is carried, so that counters never go back.
    """

    def __init__(self, status: Callable[[], EngineStatus]):
        self._status = status
        self._num_restarts = 0
        self._seen: dict[_Name, float] = {}
        self._carried: dict[_Name, float] = {}
        self.cache = (CacheStats(), 0)
        """As it was last seen, and the engine's restarts until then."""

    def describe(self) -> Iterable[Metric]:
        """Give nothing: the names are known at the first scrape."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Read the engine's state once, and give it all."""
        status = self._status()
        stats = status.stats
        cache, seen_at = self.cache
        if seen_at != status.num_restarts:
            cache = CacheStats()
        yield GaugeMetricFamily(
            "kvpaging_num_requests_running", "Sequences in the batch.", value=stats.num_running
        )
        yield GaugeMetricFamily(
            "kvpaging_num_requests_waiting", "Requests in the queue.", value=stats.num_waiting
        )
        pages = GaugeMetricFamily("kvpaging_pages", "KV pages by state.", labels=["state"])
        pages.add_metric(["free"], stats.num_free_pages)
        pages.add_metric(["cached"], stats.num_cached_pages)
        pages.add_metric(["held"], stats.num_held_pages)
        pages.add_metric(["quarantined"], stats.num_quarantined_pages)
        yield pages
        yield GaugeMetricFamily(
            "kvpaging_pinned_pages", "KV pages that pins hold.", value=stats.num_pinned_pages
        )
        totals = self._totals(
            status.num_restarts,
            {
                ("kvpaging_prefix_cache_queried_tokens", (), ()): stats.prefix_queried_tokens,
                ("kvpaging_prefix_cache_hit_tokens", (), ()): stats.prefix_hit_tokens,
                ("kvpaging_num_preemptions", (), ()): stats.num_preemptions,
            }
            | {
                (cache_metrics.PREFIX + name, labels, values): total
                for name, labels, values, total in cache_metrics.totals(cache)
            },
        )
        for (name, labels), family in groupby(totals, lambda key: key[:2]):
            counter = CounterMetricFamily(name, "By the engine's count.", labels=labels)
            for key in family:
                counter.add_metric(key[2], totals[key])
            yield counter
        yield from cache_metrics.gauges(cache)
        yield from cache_metrics.load_times(cache)
        yield CounterMetricFamily(
            "kvpaging_engine_restarts", "Engine processes after the first.", status.num_restarts
        )

    def _totals(self, num_restarts: int, current: dict[_Name, float]) -> dict[_Name, float]:
        if num_restarts != self._num_restarts:
            self._num_restarts = num_restarts
            for name, value in self._seen.items():
                self._carried[name] = self._carried.get(name, 0) + value
            self._seen = {}
        # Right after a restart the client may still hold the old process's last stats.
        self._seen |= {name: max(value, self._seen.get(name, 0)) for name, value in current.items()}
        return {
            name: self._seen.get(name, 0) + self._carried.get(name, 0)
            for name in sorted(self._seen.keys() | self._carried.keys())
        }


_Name = tuple[str, tuple[str, ...], tuple[str, ...]]
"""A metric, its labels' names and their values."""
