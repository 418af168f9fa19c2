"""A few pages go down a step, and one that leaves the device goes before its memory is written."""

from __future__ import annotations

from kvpaging.base.evictions import Evicted
from kvpaging.base.ids import PageId, PageKey
from kvpaging.cache.lower_levels import PageStore
from kvpaging.cache.prefix_key import ChainLink
from kvpaging.cache.store_queue import StoreQueue


class Room:
    """Levels with room for so many pages a step."""

    store_at_uses = (1, 2)
    num_pages = 2

    def __init__(self, *, wants_evicted: bool) -> None:
        self.wants_evicted = wants_evicted

    def num_storable(self) -> int:
        return self.num_pages

    def probe(self, links: object) -> tuple[()]:
        return ()

    def evicted(self, keys: object) -> dict[str, list[Evicted | None]]:
        return {}


def order(number: int, num_uses: int = 1) -> PageStore:
    return PageStore(
        PageId(number), PageKey(b""), ChainLink(PageKey(b"%d" % number), b""), num_uses
    )


def test_a_few_at_a_time_in_their_order() -> None:
    room = Room(wants_evicted=False)
    queue = StoreQueue(room)
    for number in range(1, 6):
        queue.add(order(number))
    assert queue.take() == (order(1), order(2))
    room.num_pages = 0
    assert queue.take() == ()
    room.num_pages = 9
    assert queue.take() == (order(3), order(4), order(5))
    assert len(queue) == 0
    assert queue.take() == ()


def test_what_leaves_goes_at_once_whatever_the_room() -> None:
    room = Room(wants_evicted=True)
    room.num_pages = 0
    queue = StoreQueue(room)
    queue.add(order(1))
    queue.add(order(2))
    queue.evicted(order(2, 0))
    queue.withdrawn(PageId(2))
    queue.withdrawn(PageId(7))
    assert queue.take() == (order(2, 0), order(2))
    assert len(queue) == 1


def test_nothing_is_ordered_of_levels_that_do_not_want_it() -> None:
    queue = StoreQueue(Room(wants_evicted=False))
    queue.evicted(order(1, 0))
    assert queue.take() == ()
    queue.add(order(1, 1))
    queue.add(order(1, 2))
    assert queue.take() == (order(1, 2),)
