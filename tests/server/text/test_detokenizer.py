from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import pytest
import tiny_text
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text import Tokenizer
from server.text.detokenizer import ByteDetokenizer, WindowDetokenizer, detokenizer_for

KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": tiny_text.byte_level,
    "sentencepiece": tiny_text.sentencepiece,
    "metaspace": tiny_text.metaspace,
}


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return Tokenizer(KINDS[kind]())


def stream(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = detokenizer_for(tokenizer)
    return [*map(detokenizer.push, token_ids), detokenizer.flush()]


def test_each_kind_gets_the_detokenizer_that_is_exact_for_it() -> None:
    assert isinstance(detokenizer_for(tokenizer_of("byte_level")), ByteDetokenizer)
    assert isinstance(detokenizer_for(tokenizer_of("sentencepiece")), WindowDetokenizer)
    assert isinstance(detokenizer_for(tokenizer_of("metaspace")), WindowDetokenizer)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_random_tokens_joined_are_what_decoding_all_at_once_gives(
    kind: str, data: st.DataObject
) -> None:
    tokenizer = tokenizer_of(kind)
    ids = st.integers(0, tokenizer.vocab_size + 3)  # with some that have no text
    token_ids = data.draw(st.lists(ids, max_size=40))
    assert "".join(stream(tokenizer, token_ids)) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_text_comes_back_in_whole_characters(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    token_ids = tokenizer.encode(text)
    pieces = stream(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids)
    if kind == "byte_level":
        assert "".join(pieces) == text
        assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer = Tokenizer(tiny_text.byte_level(vocab_size=258))  # no merges: a token is a byte
    pieces = stream(tokenizer, tokenizer.encode("a😀b"))
    assert pieces == ["a", "", "", "", "😀", "b", ""]


def test_half_a_character_at_the_end_is_one_replacement_character() -> None:
    tokenizer = Tokenizer(tiny_text.byte_level(vocab_size=258))
    pieces = stream(tokenizer, tokenizer.encode("a😀")[:-1])
    assert pieces == ["a", "", "", "", "\ufffd"]


def test_special_tokens_are_no_text() -> None:
    tokenizer = tokenizer_of("byte_level")
    assert "".join(stream(tokenizer, [tiny_text.BOS, *tokenizer.encode("hi"), 0])) == "hi"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("letter", ["x", "😀", "\ufffd"])
def test_cost_is_linear(kind: str, letter: str) -> None:
    """Twenty thousand tokens in less than a second: quadratic work would take minutes."""
    tokenizer = tokenizer_of(kind)
    token_id = tokenizer.encode(f"a{letter}")[-1]
    started = time.monotonic()
    stream(tokenizer, [token_id] * 20_000)
    assert time.monotonic() - started < 5
