from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpaging.base.ids import PageId
from kvpaging.cache.eviction.leaf_queue import LeafQueue

ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["push", "push inner", "expose", "remove", "pop"]),
        st.integers(1, 6),
        st.integers(0, 2),
    ),
    max_size=300,
)


@given(ACTIONS)
def test_it_is_a_sorted_list_of_which_leaves_are_taken(
    actions: list[tuple[str, int, int]],
) -> None:
    queue, model, serial = LeafQueue(), {}, 0
    for action, number, priority in actions:
        page_id = PageId(number)
        if action.startswith("push") and page_id not in model:
            serial += 1
            model[page_id] = [priority, serial, action == "push"]
            queue.push(page_id, priority, is_leaf=action == "push")
        elif action == "expose" and page_id in model and not model[page_id][2]:
            model[page_id][2] = True
            queue.expose(page_id)
        elif action == "remove" and page_id in model:
            del model[page_id]
            queue.remove(page_id)
        elif action == "pop":
            leaves = sorted((p, s, i) for i, (p, s, is_leaf) in model.items() if is_leaf)
            assert queue.has_leaf == bool(leaves)
            if leaves:
                assert queue.first_priority() == leaves[0][0]
                assert queue.pop() == leaves[0][2]
                del model[leaves[0][2]]
            else:
                with pytest.raises(KeyError):
                    queue.pop()
        assert len(queue) == len(model)
        assert all((PageId(i) in queue) == (PageId(i) in model) for i in range(1, 7))


def test_pages_that_come_and_go_leave_nothing_behind() -> None:
    queue = LeafQueue()
    for i in range(10_000):
        queue.push(PageId(1), i, is_leaf=True)
        queue.remove(PageId(1))
    assert len(queue._heap) < 200
