from __future__ import annotations

import pytest
from cache_machine import CacheMachine
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from retention_machine import RetentionMachine

from kvpaging.cache.eviction.names import POLICIES


@pytest.mark.parametrize("name", POLICIES)
def test_cache_machine(name: str) -> None:
    machine = type(f"CacheMachine_{name}", (CacheMachine,), {"policy": name})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None)
    )


@pytest.mark.parametrize("name", ["lru", "arc"])
def test_pins_times_priorities_and_budgets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pins", "retained"):  # as few pages as there are here would never be swept
        monkeypatch.setattr(f"kvpaging.cache.{module}.MIN_SWEPT", 0)
    machine = type(f"RetentionMachine_{name}", (RetentionMachine,), {"policy": name})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None)
    )
