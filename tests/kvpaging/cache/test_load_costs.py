"""Loading is chosen where it is measured to be faster, level by level, and misses count apart."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from kvpaging.cache.load_costs import RETRY_S, LoadCosts
from kvpaging.cache.lower_levels import Held, LevelLoad

PAGE = 16
FAST, SLOW = Held("fast", 10), Held("slow", 20)


REMOTE = Held("remote", 10)


def num_worth(costs: LoadCosts, *held: Held, now_s: float = 0.0) -> int:
    return sum(each.num_pages for each in costs.worth_loading(held, PAGE, now_s))


def measured() -> LoadCosts:
    """Computing takes 16 ms a page, the fast level 1 ms and the slow one 100 ms."""
    costs = LoadCosts()
    costs.computed(100, 0.1)
    costs.begun((FAST, SLOW), 0.0)
    costs.loaded([LevelLoad("fast", 10, 10, 0.01), LevelLoad("slow", 10, 10, 1.0)])
    return costs


def test_everything_is_tried_while_nothing_is_measured() -> None:
    costs = LoadCosts()
    assert num_worth(costs, FAST, SLOW) == 30
    costs.computed(100, 0.1)
    assert num_worth(costs, FAST, SLOW) == 30
    assert num_worth(costs) == 0


def test_a_slow_level_is_left_alone_and_tried_again_now_and_then() -> None:
    costs = measured()
    assert num_worth(costs, FAST) == 10
    assert num_worth(costs, FAST, SLOW) == 10
    for n in range(1, 4):
        due_s = n * RETRY_S
        assert num_worth(costs, SLOW, now_s=due_s - 0.01) == 0
        assert num_worth(costs, FAST, SLOW, now_s=due_s - 0.01) == 10
        assert num_worth(costs, FAST, SLOW, now_s=due_s) == 30
        assert num_worth(costs, SLOW, now_s=due_s) == 20, "no load of it has begun yet"
        costs.begun((FAST, SLOW), due_s)
    assert costs.choices().num_refused == 1 + 2 * 3


class Gaps(NamedTuple):
    """A time between two requests, and whether the second one's prompt is in the level at all."""

    gap_s: float
    is_there: bool


@given(
    st.lists(st.builds(Gaps, st.floats(0.01, 8.0), st.booleans()), min_size=1, max_size=60),
    st.integers(0, 40),
)
def test_an_empty_level_that_was_filled_is_found_within_a_bound(
    gaps: list[Gaps], num_before: int
) -> None:
    """Many misses; then another server fills it: a question in `RETRY_S`, at most and at least."""
    costs = LoadCosts()
    costs.computed(100, 10.0)
    for _ in range(20 + num_before):
        costs.begun((REMOTE,), 0.0)
        costs.loaded([LevelLoad("remote", 10, 0, 0.5)])
    now_s = asked_s = 0.0
    for gap_s, is_there in gaps:
        now_s += gap_s
        worth = costs.worth_loading((REMOTE,), PAGE, now_s)
        assert bool(worth) == (now_s - asked_s >= RETRY_S)
        if worth:
            asked_s = now_s
            costs.begun(worth, now_s)
            costs.loaded([LevelLoad("remote", 10, 10 * is_there, 0.01 if is_there else 0.5)])
            if is_there:
                assert num_worth(costs, REMOTE, now_s=now_s) == 10, "found, and believed"
                return


def test_pages_behind_a_slow_stretch_must_be_worth_the_stretch() -> None:
    costs = measured()
    behind = Held("fast", 300)  # saves 4.5 s, the stretch costs 1.7 s
    assert num_worth(costs, SLOW, behind) == 320
    assert num_worth(costs, SLOW, Held("fast", 100)) == 0


def test_misses_do_not_make_hits_look_slow() -> None:
    costs = measured()
    for _ in range(20):
        costs.loaded([LevelLoad("fast", 10, 0, 0.2)])
    costs.loaded([LevelLoad("fast", 10, 10, 0.01)])
    [fast, _] = costs.choices().levels
    assert fast.load_s_per_page is not None
    assert abs(fast.load_s_per_page - 0.001) < 1e-6
    assert abs(fast.miss_s - 0.2) < 1e-6
    assert 0 < fast.hit_ratio < 0.5


def test_a_cheap_miss_is_risked_and_a_dear_one_is_not() -> None:
    for miss_s, worth in ((0.001, 10), (1.0, 0)):
        costs = LoadCosts()
        costs.computed(100, 0.1)
        for _ in range(20):
            costs.begun((REMOTE,), 0.0)
            costs.loaded([LevelLoad("remote", 10, 0, miss_s)])
        assert num_worth(costs, REMOTE) == worth


def test_what_nobody_is_known_to_have_is_no_choice() -> None:
    costs = measured()
    costs.begun((REMOTE,), 0.0)
    costs.loaded([LevelLoad("remote", 10, 0, 10.0)])
    assert num_worth(costs, REMOTE) == 0
    assert num_worth(costs, FAST, REMOTE) == 10
    assert (costs.choices().num_loads, costs.choices().num_refused) == (1, 0)
    assert num_worth(costs, SLOW, REMOTE) == 0
    assert costs.choices().num_refused == 1


def test_a_level_that_hits_again_is_believed_again() -> None:
    costs = LoadCosts()
    costs.computed(100, 0.1)
    for _ in range(20):
        costs.begun((REMOTE,), 0.0)
        costs.loaded([LevelLoad("remote", 10, 0, 0.5)])
    assert num_worth(costs, REMOTE) == 0
    for _ in range(15):
        costs.loaded([LevelLoad("remote", 10, 10, 0.01)])
    assert num_worth(costs, REMOTE) == 10


def test_steps_of_few_tokens_say_nothing() -> None:
    costs = LoadCosts()
    costs.computed(15, 10.0)
    assert costs.choices().compute_s_per_token is None
