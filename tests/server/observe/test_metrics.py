from __future__ import annotations

from typing import Any

import pytest
from fake_engine import FakeEngineClient
from http_app import MODEL, Caller, events, make_app
from prometheus_client.parser import text_string_to_metric_families

from kvpaging.engine.messages import CacheStats, EngineStats
from server.client import EngineState
from server.observe import metrics


def samples(http: Caller) -> dict[str, float]:
    """Everything that `/metrics` says, by name and labels."""
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sample.labels.items() if k != "le")
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_engine_state_is_the_engines_at_the_moment_of_the_scrape() -> None:
    engine = FakeEngineClient()
    http = Caller(make_app(engine))
    engine.stats = EngineStats(
        num_running=3,
        num_waiting=2,
        num_free_pages=10,
        num_cached_pages=20,
        num_held_pages=33,
        num_quarantined_pages=1,
        num_preemptions=4,
        prefix_queried_tokens=100,
        prefix_hit_tokens=60,
    )
    found = samples(http)
    assert found["kvpaging_num_requests_running"] == 3
    assert found["kvpaging_num_requests_waiting"] == 2
    pages = {s: found[f"kvpaging_pages{{state={s}}}"] for s in ("free", "cached", "held")}
    assert pages == {"free": 10, "cached": 20, "held": 33}
    assert found["kvpaging_prefix_cache_queried_tokens_total"] == 100
    assert found["kvpaging_prefix_cache_hit_tokens_total"] == 60
    assert found["kvpaging_num_preemptions_total"] == 4


def test_a_restart_never_takes_a_counter_back() -> None:
    engine = FakeEngineClient()
    http = Caller(make_app(engine))
    totals = []
    for num_restarts, counted in ((0, 5), (0, 7), (0, 0), (1, 0), (1, 2), (2, 3)):
        engine.num_restarts, engine.stats = num_restarts, EngineStats(num_preemptions=counted)
        totals.append(samples(http)["kvpaging_num_preemptions_total"])
    assert totals == [5, 7, 7, 7, 9, 12]
    assert samples(http)["kvpaging_engine_restarts_total"] == 2


def test_nor_does_it_take_the_caches_back() -> None:
    engine = FakeEngineClient()
    http = Caller(make_app(engine))
    totals = []
    for num_restarts, hits in ((0, 5), (0, 7), (1, 2), (2, 3)):
        engine.num_restarts = num_restarts
        engine.cache = CacheStats(hit_pages={"device": hits})
        totals.append(samples(http)["kvpaging_cache_hit_pages_total{level=device}"])
    engine.state = EngineState.DEAD  # no answer: the last one stays
    totals.append(samples(http)["kvpaging_cache_hit_pages_total{level=device}"])
    engine.num_restarts = 3
    totals.append(samples(http)["kvpaging_cache_hit_pages_total{level=device}"])
    assert totals == [5, 7, 9, 12, 12, 12]


def test_the_cache_by_level() -> None:
    found = samples(Caller(make_app(FakeEngineClient())))
    cache = {
        name.removeprefix("kvpaging_cache_"): value
        for name, value in found.items()
        if name.startswith("kvpaging_cache_") and "_created" not in name
    }
    assert cache["hit_ratio{level=device}"] == 0.4
    assert cache["hit_ratio{level=disk}"] == 0.1
    assert cache["hit_pages_total{level=disk}"] == 10
    assert cache["queried_pages_total"] == 100
    assert cache["missed_pages_total{reason=evicted_room}"] == 6
    assert cache["compute_seconds"] == 0.016
    # 40 in place, 10 at 4 ms, 50 computed at 16 ms
    assert cache["average_access_seconds"] == pytest.approx(0.1 * 0.004 + 0.5 * 0.016)
    assert cache["compression_ratio{level=disk}"] == 1.5
    assert cache["evicted_pages_total{level=device,reason=room}"] == 6
    assert cache["evicted_pages_total{level=disk,reason=room}"] == 8
    assert cache["evicted_pages_total{level=disk,reason=flush}"] == 3
    assert cache["level_troubles_total{kind=corrupt,level=disk}"] == 3
    assert cache["level_pages{level=device}"] == 5
    assert cache["level_bytes{level=disk}"] == 700
    assert cache["load_seconds_count{level=disk}"] == 3
    assert cache["load_seconds_sum{level=disk}"] == 9.0
    assert cache["dropped_pages_total"] == 9
    assert cache["saved_seconds"] == 1.25


def test_load_times_are_cumulative() -> None:
    text = Caller(make_app(FakeEngineClient())).get("/metrics").text
    buckets = {}
    for line in text.splitlines():
        if line.startswith("kvpaging_cache_load_seconds_bucket"):
            name, value = line.rsplit(" ", 1)
            buckets[name.split('le="')[1].split('"')[0]] = float(value)
    assert (buckets["0.0001"], buckets["0.00025"], buckets["5.0"]) == (0, 2, 2)
    assert buckets["+Inf"] == 3


def test_counters_are_the_sums_of_all_usage() -> None:
    engine = FakeEngineClient(groups=(3,), late_steps=2)
    http = Caller(make_app(engine))
    prompt_tokens = completion_tokens = 0
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/generate", {"prompt": "abc", "max_new_tokens": 7, "n": 2}),
        ("/generate", {"prompt": "abcdef", "stop": "e"}),
        ("/v1/completions", {"model": MODEL, "prompt": ["ab", "c"], "max_tokens": 5}),
    ]
    for path, body in bodies:
        usage = http.post(path, body).json()["usage"]
        prompt_tokens += usage["prompt_tokens"]
        completion_tokens += usage["completion_tokens"]
    usage = events(http.post("/generate", {"prompt": "ab", "stream": True}))[-2]["usage"]
    found = samples(http)
    assert found["kvpaging_prompt_tokens_total"] == prompt_tokens + usage["prompt_tokens"]
    assert found["kvpaging_generation_tokens_total"] == (
        completion_tokens + usage["completion_tokens"]
    )
    assert found["kvpaging_requests_total{finish_reason=stop}"] == 1
    assert found["kvpaging_requests_total{finish_reason=length}"] == 5
    assert found["kvpaging_time_to_first_token_seconds_count"] == 4
    assert found["kvpaging_e2e_request_latency_seconds_count"] == 4
    assert found["kvpaging_queue_time_seconds_count"] == 5  # one for each prompt
    num_intervals = found["kvpaging_inter_token_latency_seconds_count"]
    assert 0 < num_intervals < found["kvpaging_generation_tokens_total"]


def test_failures_and_refusals_are_counted_apart() -> None:
    engine = FakeEngineClient(dies_after=1)
    http = Caller(make_app(engine))
    http.post("/generate", {"prompt": "x"})
    http.post("/generate", {"prompt": "x", "max_new_tokens": 9999})
    engine.is_full = True
    http.post("/generate", {"prompt": "x"})
    http.app.state.drain()
    http.post("/generate", {"prompt": "x"})
    found = samples(http)
    assert found["kvpaging_requests_total{finish_reason=error}"] == 1
    assert found["kvpaging_rejected_requests_total{code=overloaded}"] == 1
    assert found["kvpaging_rejected_requests_total{code=context_length_exceeded}"] == 1
    assert found["kvpaging_rejected_requests_total{code=draining}"] == 1
    assert sum(v for k, v in found.items() if k.startswith("kvpaging_requests_total")) == 1


def test_two_apps_count_for_themselves() -> None:
    one, two = Caller(make_app(FakeEngineClient())), Caller(make_app(FakeEngineClient()))
    one.post("/generate", {"prompt": "x"})
    assert samples(one)["kvpaging_requests_total{finish_reason=length}"] == 1
    assert samples(two)["kvpaging_requests_total{finish_reason=length}"] == 0


@pytest.mark.parametrize("reason", metrics.FINISH_REASONS)
def test_every_reason_is_there_from_the_start(reason: str) -> None:
    http = Caller(make_app(FakeEngineClient()))
    assert samples(http)[f"kvpaging_requests_total{{finish_reason={reason}}}"] == 0
