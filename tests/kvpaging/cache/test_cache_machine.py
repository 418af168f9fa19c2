from __future__ import annotations

from cache_machine import CacheMachine
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test


def test_cache_machine() -> None:
    run_state_machine_as_test(
        CacheMachine, settings=settings(max_examples=100, stateful_step_count=30, deadline=None)
    )
