"""A bounded memory of evictions: the last ones are known, all are counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvpaging.base.evictions import Eviction, EvictionCause, EvictionLog
from kvpaging.base.ids import PageKey


def key(number: int) -> PageKey:
    return PageKey(number.to_bytes(4, "little"))


@given(
    limit=st.integers(1, 5),
    steps=st.lists(st.tuples(st.integers(0, 12), st.sampled_from(EvictionCause)), max_size=60),
)
def test_the_last_ones_are_known_and_all_are_counted(
    limit: int, steps: list[tuple[int, EvictionCause]]
) -> None:
    log = EvictionLog(limit)
    told: dict[PageKey, Eviction] = {}
    for now, (number, cause) in enumerate(steps):
        log.now_s = float(now)
        log.add(key(number), cause)
        told[key(number)] = Eviction(float(now), cause)
        assert len(log) <= 2 * limit
        for recent, _ in steps[max(0, now + 1 - limit) : now + 1]:
            assert log.find(key(recent)) == told[key(recent)]
    for known in told:
        assert log.find(known) in (None, told[known])
    end = float(len(steps))
    ages = log.ages(map(key, range(13)), end)
    assert [age and (end - age.ago_s, age.cause) for age in ages] == [
        log.find(key(number)) for number in range(13)
    ]
    assert sum(log.counts.values()) == len(steps)
    assert log.num_evicted == sum(cause is EvictionCause.ROOM for _, cause in steps)
