"""Failures that others' caches had; `docs/cache.md` lists the test of each."""

from __future__ import annotations

import ast
import random
import re
from pathlib import Path

import pytest
from digest_model import DigestExecutor, DigestLevels, digest_config, expected_tokens
from msgspec.structs import replace

from kvpaging.base.ids import PageKey
from kvpaging.cache import prefix_key
from kvpaging.cache.cache_manager import CacheManager
from kvpaging.engine.engine import Engine
from kvpaging.scheduling.request import SamplingParams

ROOT = Path(__file__).parents[3]


def test_the_page_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "cache.md").read_text("utf-8").split("## Known failures", 1)[1]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) >= 12
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text("utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_a_page_that_is_not_full_is_not_found() -> None:
    cache = CacheManager(8, 4)
    chain = cache.chain(b"")
    chain.extend([1] * 8)
    lease = cache.reserve([], 8)
    for num_computed, num_found in ((3, 0), (4, 1), (7, 1), (8, 2)):
        cache.commit(lease, chain, num_computed)
        assert len(cache.match(chain, 9)) == num_found


def test_pages_that_a_load_fills_are_not_found() -> None:
    cache = CacheManager(8, 4)
    chain = cache.chain(b"")
    chain.extend([1] * 12)
    lease = cache.reserve([], 12)  # a load writes to it
    assert cache.match(chain, 13) == []
    cache.commit_loaded(lease, chain, 2)  # the third did not come
    assert cache.match(chain, 13) == lease.pages[:2]


@pytest.mark.parametrize("num_lost", [1, 2])
def test_a_tail_without_its_head_is_computed(num_lost: int) -> None:
    """The lower level forgets the first pages of a prompt and keeps those after them."""
    config = digest_config(num_pages=8, page_size=2, max_model_len=16, eos_token_ids=())
    levels = DigestLevels(random.Random(0), store_at_uses=(1,), wants_evicted=True, forgets=False)
    engine = Engine(config, DigestExecutor(8, 2, levels))
    prompt, sampling = [1, 2, 3, 4, 5, 6, 7], SamplingParams(max_new_tokens=3, seed=0)
    engine.generate([prompt], sampling)
    engine.generate([[9] * 15], SamplingParams(max_new_tokens=1, seed=0))
    chain = engine._cache.chain(b"")
    chain.extend(prompt)
    keys = [link.key for link in chain.links]
    assert set(keys) <= set(levels.pages)
    for key in keys[:num_lost]:
        del levels.pages[key]
    [[again]] = engine.generate([prompt], sampling)
    assert again.num_cached_tokens == 0
    assert again.token_ids == expected_tokens(prompt, 0, 0, 3, frozenset())


def test_pages_of_other_weights_are_never_found() -> None:
    """The level is the same, the weights are not: nothing of it is taken."""
    levels = DigestLevels(random.Random(0), store_at_uses=(1,), wants_evicted=True, forgets=False)
    config = digest_config(num_pages=8, page_size=2, max_model_len=16, eos_token_ids=())
    num_cached = []
    for identity in (b"old", b"new", b"old"):
        config = replace(config, numerics_identity=identity)
        engine = Engine(config, DigestExecutor(8, 2, levels))
        [[answer]] = engine.generate([[1, 2, 3, 4, 5]], SamplingParams(max_new_tokens=2, seed=0))
        num_cached.append(answer.num_cached_tokens)
    assert num_cached == [0, 0, 4]


def test_a_weak_hash_costs_hits_and_never_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of five bits: nearly all of them collide, on the device and below."""
    real = prefix_key.page_key

    def weak(parent: PageKey, namespace: bytes, tokens: bytes) -> PageKey:
        return PageKey(bytes([real(parent, namespace, tokens)[0] & 31]))

    monkeypatch.setattr(prefix_key, "page_key", weak)
    rng = random.Random(1)
    config = digest_config(num_pages=12, page_size=2, max_model_len=24, eos_token_ids=())
    sampling = SamplingParams(max_new_tokens=4, seed=0)
    levels = DigestLevels(rng, store_at_uses=(1,), wants_evicted=True)
    engine = Engine(config, DigestExecutor(12, 2, levels))
    for _ in range(60):
        prompts = [[rng.randint(1, 3) for _ in range(rng.randint(1, 9))] for _ in range(3)]
        for prompt, (answer,) in zip(prompts, engine.generate(prompts, sampling), strict=True):
            assert answer.token_ids == expected_tokens(prompt, 0, 0, 4, frozenset())
