from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvpaging.cache.prefix_key import PrefixChain, SharedPrefix, page_key, root_key

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=12)


def keys(root: bytes, namespace: bytes, size: int, tokens: list[int]) -> list[bytes]:
    chain = PrefixChain(root_key(root), namespace, size)
    chain.extend(tokens)
    return list(chain.keys())


@given(st.integers(1, 4), TOKENS, st.integers(0, 12))
def test_a_chain_grows_as_if_it_had_been_made_at_once(
    size: int, tokens: list[int], cut: int
) -> None:
    chain = PrefixChain(root_key(b""), b"", size)
    chain.extend(tokens[:cut])
    fork = chain.fork(cut)
    chain.extend(tokens)
    assert list(chain.keys()) == keys(b"", b"", size, tokens)
    assert list(fork.keys()) == keys(b"", b"", size, tokens[:cut])
    assert len(chain.links) == len(tokens) // size


@given(st.binary(max_size=8), st.binary(max_size=8), TOKENS, TOKENS)
def test_any_difference_before_a_page_changes_its_key(
    one: bytes, other: bytes, tokens: list[int], others: list[int]
) -> None:
    a, b = keys(b"", one, 2, tokens), keys(b"", other, 2, others)
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        same = one == other and tokens[: 2 * i + 2] == others[: 2 * i + 2]
        assert (x == y) == same


def test_the_root_and_the_length_of_the_namespace_are_part_of_it() -> None:
    assert keys(b"weights 1", b"", 2, [1, 2]) != keys(b"weights 2", b"", 2, [1, 2])
    root, tokens = root_key(b""), b"\1\0\0\0"
    assert page_key(root, b"ab", tokens) != page_key(root, b"a", b"b" + tokens)


@given(st.integers(1, 4), TOKENS, st.integers(0, 12))
def test_a_shared_beginning_is_the_same_for_all_and_what_follows_is_nobody_elses(
    size: int, tokens: list[int], num_shared: int
) -> None:
    shared = SharedPrefix(b"all", num_shared)
    one, other = (PrefixChain(root_key(b""), who, size, shared) for who in (b"a", b"b"))
    one.extend(tokens)
    other.extend(tokens[: len(tokens) // 2])  # in two goes, and forked between them
    other = other.fork(len(tokens) // 2)
    other.extend(tokens)
    num_equal = min(num_shared, len(tokens)) // size
    pairs = list(zip(one.keys(), other.keys(), strict=True))
    assert [a == b for a, b in pairs] == [i < num_equal for i in range(len(pairs))]
    without = keys(b"", b"a", size, tokens)
    assert set(without).isdisjoint(one.keys()) if num_equal else without == list(one.keys())
