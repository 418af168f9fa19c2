from __future__ import annotations

import math
import random

import msgspec
import pytest
from digest_model import DigestExecutor, digest_config

from kvpaging.base.ids import SeqId, StepId
from kvpaging.engine import step_times
from kvpaging.engine.step_times import StepPoint, fit
from kvpaging.replay.full_mode import StepTimes, StepWork
from kvpaging.scheduling.plan import ScheduledSequence, StepPlan


def points(**terms: float) -> list[StepPoint]:
    times = StepTimes(0.005, 2e-4, 3e-7, 1e-8, 1e-4)
    for name, value in terms.items():
        times = msgspec.structs.replace(times, **{name: value})
    made = []
    for new in (1, 4, 16, 512):
        for context in (0, 100, 2000):
            for rows in (1, 8):
                row = ScheduledSequence(SeqId(1), context, new, (), ())
                plan = StepPlan(StepId(1), (), (), (), (row,) * rows)
                made.append(StepPoint(StepWork.of(plan), times.of(plan)))
    return made


def test_the_fit_finds_what_was_put_in() -> None:
    times, error_ratio = fit(points())
    assert times.fixed_s == pytest.approx(0.005)
    assert times.per_new_token_s == pytest.approx(2e-4)
    assert times.per_context_token_s == pytest.approx(3e-7)
    assert times.per_pair_s == pytest.approx(1e-8)
    assert times.per_sequence_s == pytest.approx(1e-4)
    assert error_ratio < 1e-9


def test_the_fit_is_the_mean_of_steps_that_vary() -> None:
    lot = random.Random(1)
    varied = [
        StepPoint(point.work, point.seconds * lot.lognormvariate(0, 0.4))
        for point in points()
        for _ in range(300)
    ]
    times, _ = fit(varied)
    mean = math.exp(0.4**2 / 2)
    for point in points():
        fitted = times.of_work(point.work)
        assert fitted / point.seconds == pytest.approx(mean, rel=0.1)
    decoding = [point for point in varied if point.work.num_new_tokens < 64]
    fitted = sum(times.of_work(point.work) for point in decoding)
    assert fitted == pytest.approx(sum(point.seconds for point in decoding), rel=0.03)


def test_no_term_is_negative() -> None:
    times, _ = fit(points(per_context_token_s=-1e-6))
    assert times.per_context_token_s == 0
    assert times.fixed_s > 0


def test_an_engine_is_measured_at_all_sizes_that_fit() -> None:
    config = digest_config(num_pages=64, max_num_seqs=16, max_num_batched_tokens=64)
    engine = step_times.MeasuredEngine(config, DigestExecutor(64, 4))
    measured = step_times._points(engine)
    assert {point.work.num_new_tokens for point in measured} > {1, 4}
    assert max(point.work.num_context_tokens for point in measured) > 30
    assert all(point.seconds > 0 for point in measured)
