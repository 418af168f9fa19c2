from __future__ import annotations

import pytest

from kvpaging.base.ids import PageId
from kvpaging.cache.pins import MIN_SWEPT, Pins, PinsFull
from kvpaging.cache.prefix_key import PrefixChain, root_key

SIZE = 2


def chain(*tokens: int) -> PrefixChain:
    made = PrefixChain(root_key(b""), b"shared", SIZE)
    made.extend(tokens)
    return made


def pin(
    pins: Pins,
    name: str,
    tenant: str,
    prefix: PrefixChain,
    *,
    tenant_pages: int | None = None,
    ttl_s: float | None = None,
    now_s: float = 0.0,
) -> None:
    num_pages = len(prefix.links)
    pins.promise(name, tenant, tenant_pages, prefix, num_pages, ttl_s)
    pages = [PageId(int.from_bytes(link.key[:4], "little")) for link in prefix.links]
    pins.keep(name, prefix, pages, now_s)


def test_a_shared_page_counts_for_each_tenant_that_pins_it_and_for_no_other() -> None:
    pins = Pins(5)
    pin(pins, "a", "A", chain(1, 1, 2, 2, 3, 3), tenant_pages=3)
    pin(pins, "b", "B", chain(1, 1, 2, 2), tenant_pages=3)
    assert pins.num_pages == 3
    with pytest.raises(PinsFull) as full:
        pin(pins, "b2", "B", chain(4, 4, 5, 5), tenant_pages=3)
    assert (full.value.is_tenants, full.value.needed, full.value.pinned) == (True, 2, 2)
    assert len(pins.drop("a")) == 1
    pin(pins, "a2", "A", chain(4, 4, 5, 5), tenant_pages=2)
    assert pins.num_pages == 4
    assert len(pins.drop("b")) == len(pins.drop("a2")) == 2
    assert pins.num_pages == len(pins) == 0
    assert not pins._num_by_tenant


def test_renewing_takes_nothing_of_the_bound() -> None:
    pins = Pins(2)
    for i in range(3):
        pin(pins, f"{i}", "A", chain(1, 1, 2, 2), tenant_pages=2, ttl_s=9.0)
    assert [state.name for state in pins.states(0.0)] == ["2"]
    assert len(pins.drop("2")) == 2


@pytest.mark.parametrize("is_given_up", [False, True])
def test_pins_that_are_renewed_or_given_up_leave_nothing(is_given_up: bool) -> None:
    pins = Pins(2)
    for i in range(1000):
        pin(pins, f"{i}", "A", chain(1, 1, 2, 2), ttl_s=1e6, now_s=float(i))
        if is_given_up:
            pins.drop(f"{i}")
    assert len(pins._ends) <= 2 + MIN_SWEPT + 1
    assert pins.next_over(1e6 + 998.0) is None
    assert pins.next_over(1e6 + 999.0) == (None if is_given_up else "999")
