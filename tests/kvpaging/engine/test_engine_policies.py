"""Which page goes first changes no token."""

from __future__ import annotations

import random

import msgspec
import pytest
from digest_model import DigestExecutor, digest_config, expected_tokens

from kvpaging.cache.eviction.names import POLICIES
from kvpaging.engine.engine import Engine
from kvpaging.scheduling.request import SamplingParams


@pytest.mark.parametrize("policy", POLICIES)
def test_any_policy_gives_the_models_own_tokens(policy: str) -> None:
    config = digest_config(num_pages=24, page_size=2, max_num_seqs=5, eos_token_ids=())
    scheduler = msgspec.structs.replace(config.scheduler, eviction_policy=policy)
    engine = Engine(msgspec.structs.replace(config, scheduler=scheduler), DigestExecutor(24, 2))
    lot = random.Random(policy)
    turns = [[lot.randint(1, 2)] for _ in range(6)]
    for _ in range(40):
        prompts = [[*lot.choice(turns)[:30], lot.randint(1, 2)] for _ in range(4)]
        answers = engine.generate(prompts, SamplingParams(max_new_tokens=5, seed=0))
        for prompt, [completion] in zip(prompts, answers, strict=True):
            assert completion.token_ids == expected_tokens(prompt, 0, 0, 5, frozenset())
            turns[lot.randrange(len(turns))] = [*prompt, *completion.token_ids]
        while engine.audit_idle():
            pass
    stats = engine.stats()
    assert not stats.broken_laws
    assert stats.num_evicted_pages > 50
    assert stats.prefix_hit_tokens > 50
