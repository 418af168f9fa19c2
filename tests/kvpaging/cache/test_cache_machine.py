from __future__ import annotations

import pytest
from cache_machine import CacheMachine
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from kvpaging.cache.eviction.names import POLICIES


@pytest.mark.parametrize("name", POLICIES)
def test_cache_machine(name: str) -> None:
    machine = type(f"CacheMachine_{name}", (CacheMachine,), {"policy": name})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None)
    )
