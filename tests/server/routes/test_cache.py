"""`/cache/stats`: every number of the engine's, and what they come to."""

from __future__ import annotations

import pytest
from fake_engine import FakeEngineClient
from http_app import Caller, make_app

from kvpaging.engine.messages import CacheStats
from server.client import EngineState


def test_stats_by_level() -> None:
    told = Caller(make_app(FakeEngineClient())).get("/cache/stats").json()
    assert told["tokens"] == {"queried": 1700, "hit": 800, "hit_ratio": 800 / 1700}
    assert told["pages"] == {"queried": 100, "hit": 50, "hit_ratio": 0.5}
    assert told["missed_pages"] == {"never_seen": 44, "evicted_room": 6}
    assert told["device"] == {
        "pages": {"free": 1, "cached": 2, "held": 3, "quarantined": 0},
        "page_bytes": 64,
        "hit_pages": 40,
        "hit_ratio": 0.4,
        "evicted_pages": {"room": 6, "flush": 0},
    }
    assert told["compute_ms_per_page"] == 16.0
    assert told["average_access_ms_per_page"] == pytest.approx(0.1 * 4 + 0.5 * 16)
    assert told["choices"] == {"loaded": 3, "computed": 2}
    assert (told["saved_s"], told["recomputed_tokens"]) == (1.25, 5)
    assert (told["queued_bytes"], told["dropped_pages"]) == (128, 9)
    (disk,) = told["levels"]
    loads = disk.pop("loads")
    assert (loads["count"], loads["mean_ms"]) == (3, 3000.0)
    assert loads["buckets"][0] == [0.1, 0]
    assert loads["buckets"][1] == [0.25, 2]
    assert loads["buckets"][-1] == [None, 1]
    assert disk == {
        "level": "disk",
        "pages": 7,
        "bytes": 700,
        "capacity_bytes": 1000,
        "hit_pages": 10,
        "hit_ratio": 0.1,
        "access_ms_per_page": 4.0,
        "found_ratio": 0.5,
        "miss_ms": 100.0,
        "read": {"pages": 10, "bytes": 640, "seconds": 2.0, "bytes_per_s": 320.0},
        "written": {"pages": 15, "bytes": 1500, "seconds": 3.0, "bytes_per_s": 500.0},
        "compression_ratio": 1.5,
        "evicted_pages": {"room": 8, "flush": 3},
        "late_pages": 2,
        "refused_pages": 1,
        "corrupt_pages": 3,
        "failures": 4,
    }


def test_what_was_not_measured_is_null() -> None:
    told = Caller(make_app(FakeEngineClient(cache=CacheStats()))).get("/cache/stats").json()
    assert told["pages"]["hit_ratio"] == 0
    assert told["compute_ms_per_page"] is told["average_access_ms_per_page"] is None
    assert told["levels"] == []


def test_without_an_engine_there_are_none() -> None:
    for engine in (FakeEngineClient(config=None), FakeEngineClient(state=EngineState.DEAD)):
        answer = Caller(make_app(engine)).get("/cache/stats")
        assert answer.status_code == 503
        assert answer.headers["retry-after"]


def test_emptying_says_what_was_there() -> None:
    http = Caller(make_app(FakeEngineClient()))
    answer = http.request("DELETE", "/cache")
    assert answer.json() == {"pages": {"device": 5, "disk": 7, "remote": None}, "failed": []}
    disk = http.request("DELETE", "/cache?level=disk").json()
    assert disk == {"pages": {"disk": 7}, "failed": []}
    assert http.request("GET", "/cache").status_code == 405


def test_a_level_that_could_not_be_emptied_is_no_success() -> None:
    http = Caller(make_app(FakeEngineClient(levels_that_fail=("disk",))))
    answer = http.request("DELETE", "/cache")
    assert answer.status_code == 502
    assert answer.json() == {"pages": {"device": 5, "remote": None}, "failed": ["disk"]}
    assert http.request("DELETE", "/cache?level=disk").status_code == 502
    assert http.request("DELETE", "/cache?level=device").status_code == 200


def test_a_level_that_is_not_there_is_no_success() -> None:
    answer = Caller(make_app(FakeEngineClient())).request("DELETE", "/cache?level=tape")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "level"
    assert "'tape'" in answer.json()["error"]["message"]


def test_only_the_operator_empties_it() -> None:
    http = Caller(make_app(FakeEngineClient(), api_keys=("k",), operator_key="op"))
    for key, status in (("k", 403), ("op", 200)):
        headers = {"Authorization": f"Bearer {key}"}
        assert http.request("DELETE", "/cache", headers=headers).status_code == status
