from __future__ import annotations

import pytest
from digest_model import DigestExecutor, digest_config

from kvpaging.engine import step_times
from kvpaging.engine.step_times import StepPoint, fit


def test_the_fit_finds_what_was_put_in() -> None:
    points = [
        StepPoint(new, context, 0.005 + new * 2e-4 + context * 3e-7)
        for new in (1, 4, 16, 512)
        for context in (0, 100, 2000)
    ]
    times, error_ratio = fit(points)
    assert times.fixed_s == pytest.approx(0.005)
    assert times.per_new_token_s == pytest.approx(2e-4)
    assert times.per_context_token_s == pytest.approx(3e-7)
    assert error_ratio < 1e-9


def test_no_term_is_negative() -> None:
    points = [
        StepPoint(new, context, 0.01 + new * 1e-4 - context * 1e-7)
        for new in (1, 4, 16)
        for context in (0, 100, 2000)
    ]
    times, _ = fit(points)
    assert times.per_context_token_s == 0
    assert times.fixed_s > 0


def test_an_engine_is_measured_at_all_sizes_that_fit() -> None:
    config = digest_config(num_pages=64, max_num_seqs=16, max_num_batched_tokens=64)
    engine = step_times._MeasuredEngine(config, DigestExecutor(64, 4))
    points = step_times._points(engine)
    assert {point.num_new_tokens for point in points} > {1, 4}
    assert max(point.num_context_tokens for point in points) > 30
    assert all(point.seconds > 0 for point in points)
