from __future__ import annotations

import msgspec
import pytest

from kvpaging.base.errors import ConfigError
from kvpaging.replay.full_mode import Limits, StepTimes
from kvpaging.replay.sizing import Expectation, ModelSize, at_rate, expect, times_of_device
from kvpaging.replay.trace import Trace

SIZE = ModelSize(
    weight_bytes=2 * 10**9,
    num_parameters=10**9,
    kv_bytes_per_token=1000,
    attention_flops_per_pair=100_000,
    max_model_len=60_000,
)


def expected(trace: Trace, rate: float, kv_bytes: int = 400 * 10**6) -> Expectation:
    return expect(
        trace,
        SIZE,
        kv_bytes,
        times_of_device(SIZE, 10**12, 10**14),
        requests_per_s=rate,
        page_size=64,
        limits=Limits(32, 4096),
        policy="lru",
        num_requests=60,
    )


def test_a_device_reads_its_weights_once_a_step() -> None:
    times = times_of_device(SIZE, 10**12, 10**14)
    assert times.fixed_s == pytest.approx(2e-3)
    assert times.per_new_token_s == pytest.approx(2e-5)
    assert times.per_context_token_s == pytest.approx(1e-9)
    assert times.per_pair_s == pytest.approx(1e-9)


@pytest.mark.parametrize("rate", [0.5, 20.0])
def test_arrivals_come_at_the_rate_that_was_asked_for(small: Trace, rate: float) -> None:
    requests = list(at_rate(small, rate, 100))
    assert len(requests) == 100
    assert 99 / requests[-1].arrival_s == pytest.approx(rate)
    assert [r.blocks for r in requests] == [r.blocks for r in small][:100]


def test_more_load_is_more_waiting(small: Trace) -> None:
    calm, busy = expected(small, 1.0), expected(small, 50.0)
    assert not calm.is_overloaded
    assert busy.is_overloaded
    assert calm.outcome.latencies is not None
    assert busy.outcome.latencies is not None
    assert busy.outcome.latencies.ttft_p50_s > 5 * calm.outcome.latencies.ttft_p50_s
    assert calm.num_pages == 400 * 10**6 // 64_000 - 1
    assert calm.num_tokens_that_fit == calm.num_pages * 64
    assert msgspec.json.encode(calm.as_json())


def test_less_memory_finds_less_and_none_is_refused(small: Trace) -> None:
    assert (
        expected(small, 1.0, 40 * 10**6).outcome.num_hit_tokens
        < expected(small, 1.0).outcome.num_hit_tokens
    )
    with pytest.raises(ConfigError, match="are left for KV pages"):
        expected(small, 1.0, 100_000)


def test_a_trace_without_time_has_no_rate(small: Trace) -> None:
    empty = Trace(small.path, 512, lambda _: iter(()))
    with pytest.raises(ConfigError, match="no rate"):
        at_rate(empty, 1.0)


def test_longer_than_the_model_is_rejected(small: Trace) -> None:
    short = msgspec.structs.replace(SIZE, max_model_len=4096)
    found = expect(
        small,
        short,
        400 * 10**6,
        StepTimes(),
        requests_per_s=1.0,
        page_size=64,
        limits=Limits(),
        policy="lru",
        num_requests=50,
    )
    assert 0 < found.outcome.num_rejected < 50
