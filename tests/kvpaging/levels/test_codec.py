"""Values: what comes back, what they shrink to, and that no changed byte passes."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from level_pages import ROOT, key_of, page_of

from kvpaging.levels.codec import HEADER_BYTES, BadValue, PageCodec, read_header
from kvpaging.levels.level import StoredPage


@given(
    payload=st.one_of(
        st.binary(max_size=300),
        st.builds(lambda b, n: b * n, st.binary(min_size=1, max_size=9), st.integers(1, 900)),
    ),
    tokens=st.binary(max_size=70),
    item_bytes=st.sampled_from([1, 2, 3, 4, 8]),
    compress=st.booleans(),
)
@settings(deadline=None)
def test_comes_back(payload: bytes, tokens: bytes, item_bytes: int, compress: bool) -> None:
    page = StoredPage(key_of(1), key_of(0), tokens, payload)
    value = PageCodec(ROOT, item_bytes, compress=compress).encode(page)
    back = PageCodec(ROOT, 2).decode(value, page.key)  # a value says itself how it is packed
    assert back == page
    assert read_header(value).value_bytes == len(value)


def test_shrinks_exponents_and_leaves_noise_alone() -> None:
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, 1 << 16, np.uint8).tobytes()
    values = rng.normal(size=1 << 15).astype(np.float32).view(np.uint16)[1::2].tobytes()
    codec = PageCodec(ROOT, 2)

    def num_bytes(payload: bytes) -> int:
        return len(codec.encode(StoredPage(key_of(1), key_of(0), b"", payload)))

    assert num_bytes(values) < 0.75 * len(values)
    assert len(noise) < num_bytes(noise) < len(noise) + 200
    assert num_bytes(bytes(1 << 16)) < 1000


@pytest.mark.parametrize("compress", [False, True])
def test_no_changed_byte_passes(compress: bool) -> None:
    codec = PageCodec(ROOT, 2, compress=compress)
    page = page_of(7, 200)
    value = codec.encode(page)
    for i in range(len(value)):
        for flip in (1, 0x80, 0xFF):
            broken = bytearray(value)
            broken[i] ^= flip
            with pytest.raises(BadValue):
                codec.decode(bytes(broken), page.key)
    assert codec.decode(value, page.key) == page


def test_no_cut_or_longer_value_passes() -> None:
    codec = PageCodec(ROOT, 2)
    page = page_of(7, 200)
    value = codec.encode(page)
    for end in range(len(value)):
        with pytest.raises(BadValue):
            codec.decode(value[:end], page.key)
    with pytest.raises(BadValue):
        codec.decode(value + b"\0", page.key)


@given(st.binary(max_size=3 * HEADER_BYTES))
def test_any_bytes_are_refused(value: bytes) -> None:
    with pytest.raises(BadValue):
        PageCodec(ROOT, 2).decode(value, key_of(1))


def test_a_page_is_only_itself() -> None:
    codec = PageCodec(ROOT, 2)
    value = codec.encode(page_of(1))
    with pytest.raises(BadValue, match="another page"):
        codec.decode(value, key_of(2))
    with pytest.raises(BadValue, match="numerics"):
        PageCodec(b"x" * 32, 2).decode(value, key_of(1))


def test_many_at_once_are_each_alone() -> None:
    """Of one batch a broken page is told from the others, whatever they are packed like."""
    payloads = [page_of(n, size).payload for n, size in enumerate((200, 0, 4000, 200, 64))]
    pages = [page_of(n)._replace(payload=payload) for n, payload in enumerate(payloads)]
    codecs = [PageCodec(ROOT, item, compress=item > 0) for item in (2, 4, 2, 2, 0)]
    values = [codec.encode(page) for codec, page in zip(codecs, pages, strict=True)]
    asked = [(value, page.key) for value, page in zip(values, pages, strict=True)]
    assert PageCodec(ROOT, 2).decode_many(asked) == pages
    assert PageCodec(ROOT, 2).decode_many([]) == []
    asked[2] = (values[2][:-1] + b"x", pages[2].key)
    asked[3] = (forged(values[3]), pages[3].key)  # its digest is right, its planes are not
    found = PageCodec(ROOT, 2).decode_many(asked)
    assert [isinstance(page, BadValue) for page in found] == [False, False, True, True, False]
    assert [page for page in found if not isinstance(page, BadValue)] == [
        pages[i] for i in (0, 1, 4)
    ]


def forged(value: bytes) -> bytes:
    """A value with another packed body of the same length, and a digest that fits."""
    header = read_header(value)
    body_at = HEADER_BYTES + header.token_bytes + 4 * header.item_bytes
    changed = value[:body_at] + bytes(len(value) - body_at - 16)
    return changed + xxhash.xxh3_128_digest(changed)
