from __future__ import annotations

import random

import pytest

from kvpaging.base.ids import PageKey
from kvpaging.cache.retained import MIN_SWEPT, RetainedKeys
from kvpaging.cache.retention import Retention


def key(name: str) -> PageKey:
    return PageKey(name.encode().ljust(32, b"."))


@pytest.mark.parametrize("seed", range(20))
def test_a_key_asked_for_anew_is_over_at_its_new_end_whatever_was_swept(seed: int) -> None:
    """Its first, later end is still in the queue when the second, sooner one comes."""
    lot = random.Random(seed)
    retained = RetainedKeys()
    again = key("again")
    others = [key(f"other {i}") for i in range(MIN_SWEPT)]
    retained.ask(again, Retention(ttl_s=1e6), is_new=True)
    for other in others:
        retained.ask(other, Retention(ttl_s=1e6 * lot.random()), is_new=True)
    retained.forget(again)
    retained.ask(again, Retention(ttl_s=1.0), is_new=True)
    for other in others:
        retained.forget(other)
    for i in range(MIN_SWEPT):
        retained.ask(key(f"new {i}"), Retention(ttl_s=5e6), is_new=True)
    retained.now_s = 10.0
    assert retained.next_over() == again


def test_keys_that_come_and_go_leave_nothing() -> None:
    retained = RetainedKeys()
    for i in range(1000):
        retained.ask(key(f"{i}"), Retention(ttl_s=1e6), is_new=True)
        retained.forget(key(f"{i}"))
    assert len(retained._queue) <= MIN_SWEPT + 1
