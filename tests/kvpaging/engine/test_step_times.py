from __future__ import annotations

import msgspec
import pytest
from digest_model import DigestExecutor, digest_config

from kvpaging.base.ids import SeqId, StepId
from kvpaging.engine import step_times
from kvpaging.engine.step_times import StepPoint, fit
from kvpaging.replay.full_mode import StepTimes, StepWork
from kvpaging.scheduling.plan import ScheduledSequence, StepPlan


def points(**terms: float) -> list[StepPoint]:
    times = StepTimes(0.005, 2e-4, 3e-7, 1e-8)
    for name, value in terms.items():
        times = msgspec.structs.replace(times, **{name: value})
    made = []
    for new in (1, 4, 16, 512):
        for context in (0, 100, 2000):
            plan = StepPlan(
                StepId(1), (), (), (), (ScheduledSequence(SeqId(1), context, new, (), ()),)
            )
            made.append(StepPoint(StepWork.of(plan), times.of(plan)))
    return made


def test_the_fit_finds_what_was_put_in() -> None:
    times, error_ratio = fit(points())
    assert times.fixed_s == pytest.approx(0.005)
    assert times.per_new_token_s == pytest.approx(2e-4)
    assert times.per_context_token_s == pytest.approx(3e-7)
    assert times.per_pair_s == pytest.approx(1e-8)
    assert error_ratio < 1e-9


def test_no_term_is_negative() -> None:
    times, _ = fit(points(per_context_token_s=-1e-6))
    assert times.per_context_token_s == 0
    assert times.fixed_s > 0


def test_an_engine_is_measured_at_all_sizes_that_fit() -> None:
    config = digest_config(num_pages=64, max_num_seqs=16, max_num_batched_tokens=64)
    engine = step_times._MeasuredEngine(config, DigestExecutor(64, 4))
    measured = step_times._points(engine)
    assert {point.work.num_new_tokens for point in measured} > {1, 4}
    assert max(point.work.num_context_tokens for point in measured) > 30
    assert all(point.seconds > 0 for point in measured)
