"""The order in which pages leave a level, beside the plainest model of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from level_pages import ROOT, key_of

from kvpaging.base.ids import PageKey
from kvpaging.levels.chain_order import ChainOrder

NUMBERS = st.lists(st.integers(0, 15), max_size=5)
CALLS = st.lists(st.tuples(st.sampled_from(["add", "use", "leave", "remove"]), NUMBERS))


def parent_of(number: int) -> PageKey:
    """Page 0 begins all; each page has up to two that follow it."""
    return key_of((number - 1) // 2) if number else ROOT


@given(CALLS)
def test_a_page_leaves_after_all_that_follow_it_and_else_by_its_last_use(
    calls: list[tuple[str, list[int]]],
) -> None:
    order = ChainOrder()
    uses: dict[int, tuple[int, int]] = {}  # a page's last use: which call, and how early in it
    for at, (call, numbers) in enumerate(calls):
        if call == "add":
            order.add((key_of(n), parent_of(n)) for n in numbers)
            uses.update(dict.fromkeys((n for n in numbers if n not in uses), (at, 0)))
        if call in ("add", "use"):
            if call == "use":
                order.use([key_of(n) for n in numbers])
            for place, number in reversed(list(enumerate(numbers))):
                while number in uses:
                    uses[number] = (at, -place)
                    if not number:
                        break
                    number = (number - 1) // 2
        elif call == "leave" and uses:
            first = next(n for n in range(16) if key_of(n) == order.first)
            assert 2 * first + 1 not in uses
            assert 2 * first + 2 not in uses
            leaves = [n for n in uses if 2 * n + 1 not in uses and 2 * n + 2 not in uses]
            assert uses[first] == min(uses[n] for n in leaves)
            order.remove(key_of(first))
            del uses[first]
        elif call == "remove":
            for number in numbers:
                order.remove(key_of(number))
                uses.pop(number, None)
        assert set(order) == {key_of(n) for n in uses}
        assert len(order) == len(uses)


def test_what_follows_a_page_without_room_has_none_until_that_page_comes_again() -> None:
    order = ChainOrder()
    order.add([(key_of(0), ROOT), (key_of(1), key_of(0))])
    order.refuse(key_of(1))
    order.add([(key_of(3), key_of(1))])
    order.add([(key_of(7), key_of(3)), (key_of(2), key_of(0))])
    assert set(order) == {key_of(0), key_of(2)}
    assert order.was_refused(key_of(7))
    order.add([(key_of(1), key_of(0)), (key_of(3), key_of(1))])
    assert set(order) == {key_of(n) for n in (0, 1, 2, 3)}
    assert not order.was_refused(key_of(3))


def test_a_ring_of_parents_ends() -> None:
    order = ChainOrder()
    order.add([(key_of(1), key_of(2)), (key_of(2), key_of(3)), (key_of(3), key_of(1))])
    order.add([(key_of(4), key_of(4))])
    order.use([key_of(2)])
    assert set(order) == {key_of(n) for n in (1, 2, 3, 4)}
    assert order.first == key_of(4)
