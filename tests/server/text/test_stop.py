from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.stop import StopStrings

TEXT = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


def feed_all(stops: StopStrings, pieces: list[str]) -> tuple[str, str | None]:
    given_text = ""
    for piece in pieces:
        certain, stop = stops.feed(piece)
        given_text += certain
        if stop is not None:
            return given_text, stop
    return given_text + stops.flush(), None


def expected(text: str, strings: list[str]) -> tuple[str, str | None]:
    """The definition, written plainly: the first end of any, of two the longer."""
    for end in range(1, len(text) + 1):
        complete = [string for string in strings if text[:end].endswith(string)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


def cut(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


@given(text=TEXT, strings=STOPS, cuts=st.lists(st.integers(0, 30), max_size=8))
@settings(max_examples=500, deadline=None)
def test_what_is_found_is_the_definition_however_the_text_is_cut(
    text: str, strings: list[str], cuts: list[int]
) -> None:
    assert feed_all(StopStrings(strings), cut(text, cuts)) == expected(text, strings)


@given(text=TEXT, strings=STOPS)
@settings(max_examples=300, deadline=None)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, strings: list[str]) -> None:
    stops = StopStrings(strings)
    so_far = ""
    for end, char in enumerate(text, 1):
        certain, stop = stops.feed(char)
        if stop is not None:
            return
        so_far += certain
        held = text[len(so_far) : end]
        open_starts = [
            text[end - size : end]
            for size in range(1, end + 1)
            if any(string.startswith(text[end - size : end]) for string in strings)
        ]
        assert held == max(open_starts, key=len, default="")


@given(text=TEXT, strings=STOPS)
@settings(max_examples=200, deadline=None)
def test_included_the_text_ends_with_the_stop_string(text: str, strings: list[str]) -> None:
    before, stop = expected(text, strings)
    included = feed_all(StopStrings(strings, include=True), list(text))
    assert included == (before + (stop or ""), stop)


def test_a_string_that_is_complete_while_not_armed_is_passed_over() -> None:
    stops = StopStrings(["aba"])
    assert stops.feed("aba", armed=False) == ("ab", None)  # the last a may begin another
    assert stops.feed("ba") == ("", "aba")


@pytest.mark.parametrize("strings", [["a" * 1000 + "b"] * 8, ["ab" * 500 + "c"]])
def test_a_hard_case_is_no_harder(strings: list[str]) -> None:
    stops = StopStrings(strings)
    text = "ab" * 20_000 if "c" in strings[0] else "a" * 40_000
    assert feed_all(stops, [text]) == (text, None)
