"""Loading is chosen where it is measured to be faster, level by level, and misses count apart."""

from __future__ import annotations

from kvpaging.cache.load_costs import RETRY_EVERY, LoadCosts
from kvpaging.cache.lower_levels import Held, LevelLoad

PAGE = 16
FAST, SLOW = Held("fast", 10), Held("slow", 20)


def measured() -> LoadCosts:
    """Computing takes 16 ms a page, the fast level 1 ms and the slow one 100 ms."""
    costs = LoadCosts()
    costs.computed(100, 0.1)
    costs.loaded([LevelLoad("fast", 10, 10, 0.01), LevelLoad("slow", 10, 10, 1.0)])
    return costs


def test_everything_is_tried_while_nothing_is_measured() -> None:
    costs = LoadCosts()
    assert costs.num_worth_loading((FAST, SLOW), PAGE) == 30
    costs.computed(100, 0.1)
    assert costs.num_worth_loading((FAST, SLOW), PAGE) == 30
    assert costs.num_worth_loading((), PAGE) == 0


def test_a_slow_level_is_left_alone_and_tried_again_now_and_then() -> None:
    costs = measured()
    assert costs.num_worth_loading((FAST,), PAGE) == 10
    assert costs.num_worth_loading((FAST, SLOW), PAGE) == 10
    answers = [costs.num_worth_loading((SLOW,), PAGE) for _ in range(2 * RETRY_EVERY)]
    assert answers.count(20) == 2
    assert answers.count(0) == 2 * RETRY_EVERY - 2


def test_pages_behind_a_slow_stretch_must_be_worth_the_stretch() -> None:
    costs = measured()
    behind = Held("fast", 300)  # saves 4.5 s, the stretch costs 1.7 s
    assert costs.num_worth_loading((SLOW, behind), PAGE) == 320
    assert costs.num_worth_loading((SLOW, Held("fast", 100)), PAGE) == 0


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
            costs.loaded([LevelLoad("remote", 10, 0, miss_s)])
        assert costs.num_worth_loading((Held("remote", 10),), PAGE) == worth


def test_what_nobody_is_known_to_have_is_no_choice() -> None:
    costs = measured()
    costs.loaded([LevelLoad("remote", 10, 0, 10.0)])
    assert costs.num_worth_loading((Held("remote", 10),), PAGE) == 0
    assert costs.num_worth_loading((FAST, Held("remote", 10)), PAGE) == 10
    assert (costs.choices().num_loads, costs.choices().num_refused) == (1, 0)
    assert costs.num_worth_loading((SLOW, Held("remote", 10)), PAGE) == 0
    assert costs.choices().num_refused == 1


def test_a_level_that_hits_again_is_believed_again() -> None:
    costs = LoadCosts()
    costs.computed(100, 0.1)
    for _ in range(20):
        costs.loaded([LevelLoad("remote", 10, 0, 0.5)])
    assert costs.num_worth_loading((Held("remote", 10),), PAGE) == 0
    for _ in range(15):
        costs.loaded([LevelLoad("remote", 10, 10, 0.01)])
    assert costs.num_worth_loading((Held("remote", 10),), PAGE) == 10


def test_steps_of_few_tokens_say_nothing() -> None:
    costs = LoadCosts()
    costs.computed(15, 10.0)
    assert costs.choices().compute_s_per_token is None
